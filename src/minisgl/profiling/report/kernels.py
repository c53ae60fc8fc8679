"""`analysis.md`: each kernel's execution model, what was measured, and which limit binds at which size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from minisgl.profiling.compare import NEAR_FLOOR, best_rows, case_text, median_us
from minisgl.profiling.ncu import RULES, label
from minisgl.profiling.record import Record
from minisgl.profiling.report import plots
from minisgl.profiling.report.markdown import (
    missing,
    number,
    origin,
    percent,
    section,
    size,
    skipped,
    spread,
    table,
    words,
)
from minisgl.profiling.report.sources import Sources, command

SWEEPS = ("index", "store", "attention")  # kinds whose rows time kernels
ALONG = ("tokens", "batch", "context", "distinct")  # sizes that a table walks along; the others define it
_PLAIN = ("of", "kernel", "grid", "block", "advice")  # of ncu's rows: no figures
_MEMORY = ("HBM", "L2", "cpu")


@cache
def notes() -> dict[str, dict[str, str]]:
    """What a reader must know of each kernel that no measurement tells."""
    path = files("minisgl.profiling.report") / "notes.json"
    return msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, str]])


def render(sources: Sources) -> str:
    """The whole page."""
    parts = [_correctness(sources)]
    for kind in SWEEPS:
        record = sources.get(kind)
        if record is None:
            parts.append(section(kind, notes().get(kind, {}).get("model", ""), missing(kind, command(kind))))
            continue
        names = list(dict.fromkeys(row["kernel"] for row in record.rows)) or [kind]
        parts += [_kernel(name, record, sources) for name in names]
    others = sorted(set(notes()) - {row["kernel"] for kind in SWEEPS for row in _rows(sources.get(kind))} - set(SWEEPS))
    parts.append(section("Other kernels", *(_other(name, sources) for name in others)))
    parts.append(_intensity(sources))
    return section("The kernels, one by one", *parts, level=1)


def _other(name: str, sources: Sources) -> str:
    seen = _ncu(name, sources) if _counted(name, sources.get("ncu")) else ""
    return "\n\n".join(filter(None, [f"**{name}.** {notes()[name]['model']}", seen]))


def _rows(record: Record | None) -> list[dict[str, Any]]:
    return record.rows if record else []


def _kernel(name: str, record: Record, sources: Sources) -> str:
    rows = [row for row in record.rows if row["kernel"] == name and "fraction" in row]
    note = notes().get(name, {})
    parts = [f"**Execution model.** {note['model']}" if note else "", origin(record)]
    if note.get("levers"):
        parts.append(f"**What is tuned.** {note['levers'][0].upper()}{note['levers'][1:]}.")
    best = best_rows(rows)
    if rows:
        svg = plots.size_roofline(name, rows, record.ceilings)
        parts.append(sources.plot(f"roofline-{name}", svg, f"{name}: bandwidth against bytes, and the roofs"))
    if best:
        parts += [f"**Classification.** {classify(best)}", f"**Which limit binds.** {binding(best)}"]
    parts += [_measured(rows, best), _versions(name, rows, sources), _scatter(record), _ncu(name, sources)]
    return section(name, *parts, skipped(record))


# -- what binds ------------------------------------------------------------------------------------------------------


def classify(best: Sequence[Mapping[str, Any]]) -> str:
    """A kernel's class from its rows: what binds most sizes, and how near it comes where the launch doesn't bind.

    Rows that a GPU read from a cache say nothing of its memory; they count where there are no others.
    """
    best = [row for row in best if not (row["limit"] == "HBM" and is_cached(row))] or best
    bound = Counter(row["limit"] for row in best)
    large = [row for row in best if row["limit"] != "launch"]
    if not large:
        return "Launch-bound at every size measured: only fewer launches would help."
    limit = Counter(row["limit"] for row in large).most_common(1)[0][0]
    kind = "bandwidth-bound" if limit in _MEMORY else "compute-bound"
    top = max(large, key=lambda row: row["fraction"])
    verdict = "near its limit: minor tuning is left" if top["fraction"] >= NEAR_FLOOR else "short of its limit"
    cached = ", the data in part from a cache" if is_cached(top) else ""
    small = ""
    if bound["launch"]:
        times = sorted(1 / row["fraction"] for row in best if row["limit"] == "launch")
        span = " to ".join(dict.fromkeys((number(times[0], 2), number(times[-1], 2))))
        small = f"; launch-bound at {bound['launch']} of {len(best)} sizes, there {span} times an empty launch"
    where = f"{percent(top['fraction'])} of {limit} at {case_text(top['case'])}{cached}"
    return f"{kind.capitalize()}, {verdict} ({where}){small}."


def is_cached(row: Mapping[str, Any]) -> bool:
    """Whether a row is faster than its memory allows, so that data came from a cache in front of it."""
    return row["limit"] in ("cpu", "HBM") and bool(row["fraction"] > 1.02)  # a ceiling is a measurement too


def binding(best: Sequence[Mapping[str, Any]]) -> str:
    """Ranges of bytes by the limit that binds them."""
    ordered = sorted(best, key=lambda row: row["bytes"])
    ranges: list[tuple[str, int, int]] = []
    for row in ordered:
        if ranges and ranges[-1][0] == row["limit"]:
            ranges[-1] = (row["limit"], ranges[-1][1], row["bytes"])
        else:
            ranges.append((row["limit"], row["bytes"], row["bytes"]))
    if len(ranges) > 4:  # limits that alternate, as with cases of different intensity
        counts = Counter(row["limit"] for row in ordered)
        return ", ".join(f"{limit} in {count} of {len(ordered)} cases" for limit, count in counts.most_common()) + "."
    told = (f"{limit} at {size(low)}" + (f" to {size(high)}" if high > low else "") for limit, low, high in ranges)
    return "; ".join(told) + "."


# -- tables ----------------------------------------------------------------------------------------------------------


def main_group(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of the setting (width, dtype, order …) that was measured at most sizes."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr(_setting(row)), []).append(row)
    return max(groups.values(), key=lambda group: len({repr(row["case"]) for row in group}), default=[])


def _setting(row: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: value for name, value in row["case"].items() if name not in ALONG and name != "vocab"}
    return sizes | {name: row[name] for name in ("dtype", "order", "phase") if name in row}


def _measured(rows: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]]) -> str:
    """The best version at every size, beside a plain copy and torch's operator."""
    shown = best if len(best) <= 24 else main_group(best)
    plain = {(repr(r["case"]), r.get("dtype"), r["version"]): r for r in rows if r["version"] in ("copy", "torch")}
    lines = []
    for row in shown:
        others = [plain.get((repr(row["case"]), row.get("dtype"), name)) for name in ("copy", "torch")]
        detail = ", ".join(filter(None, (row.get("phase"), row.get("order"), row.get("dtype"))))
        lines.append(
            (
                case_text(row["case"]),
                detail,
                row["version"],
                spread(row["us"]),
                *(number(median_us(other) if other else None) for other in others),
                number(row.get("gbps")),
                number(row["floor_us"]),
                f"{percent(row['fraction'])} of {row['limit']}{' (cached)' * is_cached(row)}",
            )
        )
    if not lines:
        return ""
    left = f"\n\n_{len(best) - len(shown)} other settings are in the JSON._" if len(best) > len(shown) else ""
    head = ("case:", "what:", "version:", "µs (p10–p90)", "copy µs", "torch µs", "GB/s", "floor µs", "reached:")
    return table(head, lines) + left


def _versions(name: str, rows: Sequence[dict[str, Any]], sources: Sources) -> str:
    """The ladder: every version's time at the sizes of the main setting."""
    plain = [row for row in rows if "distinct" not in row["case"]]  # repeated rows are other work
    tuned = [row for row in plain if not row.get("config") or row["version"].endswith("no pdl")]
    group = [row for row in main_group(tuned) if row["version"] != "copy"]
    along = next((n for n in ALONG if len({row["case"].get(n) for row in group}) > 1), None)
    fixed = {n: _most_common(group, n) for n in ALONG if n != along and any(n in row["case"] for row in group)}
    group = [row for row in group if all(row["case"].get(n) == value for n, value in fixed.items())]
    if along is None:
        return ""
    series = _fastest(group, along)
    if len(series) < 2:
        return ""
    setting = fixed | _setting(group[0])
    swept = _fastest([r for r in plain if r.get("config") and r not in tuned and fixed | _setting(r) == setting], along)
    told = {**series, **{f"{version}, best of the sweep": times for version, times in swept.items()}}
    sizes = sorted({n for times in series.values() for n in times})
    lines = [(version, *(number(times.get(n)) for n in sizes)) for version, times in told.items()]
    shown = sources.plot(f"versions-{name}", plots.version_times(name, series, along), f"{name}: time by version")
    how = "Each runs as the tuning table had it then; the best of the sweep is that of all threads and work measured."
    text = f"**Versions**, µs at {along}; {case_text(setting)}:\n\n{table(('version:', *map(str, sizes)), lines)}"
    return "\n\n".join(filter(None, (text, how if swept else "", shown)))


def _fastest(rows: Sequence[Mapping[str, Any]], along: str) -> dict[str, dict[int, float]]:
    """By version, microseconds by size."""
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        us = median_us(row)
        if us:
            times = series.setdefault(row["version"], {})
            times[row["case"][along]] = min(us, times.get(row["case"][along], us))
    return series


def _most_common(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    return Counter(row["case"].get(name) for row in rows).most_common(1)[0][0]


def _scatter(record: Record) -> str:
    costs = record.summary.get("scatter_percent")
    if not costs:
        return ""
    orders = list(dict.fromkeys(order for cost in costs for order in cost["percent"]))
    ours = [cost for cost in costs if cost["version"] != "torch"] or costs
    whole = [cost for cost in ours if set(cost["percent"]) == set(orders)] or ours  # in every order
    lines = [
        (
            c["version"],
            c["tokens"],
            c["width"],
            *(f"{c['percent'][o]:+.0f}%" if o in c["percent"] else "–" for o in orders),
        )
        for c in whole
        if c["percent"]
    ]
    shown = table(("version:", "tokens", "width", *orders), lines)
    return f"**What scattered slots cost** against sequential ones:\n\n{shown}"


def _ncu(name: str, sources: Sources) -> str:
    """What the profiler saw in the kernel, where it ran."""
    rows = _counted(name, sources.get("ncu"))
    if not rows:
        absent = missing("SM use, stalls, sectors, registers", f"minisgl profile ncu --kernels {name}")
        return f"**Inside the kernel.** {absent}"
    facts = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in _PLAIN]
    lines = [(label(row), *(_fact(row.get(name)) for name in facts)) for row in rows]
    advice = [
        f"- {rule.when}: {rule.advice} ({words(held)})"
        for rule in RULES
        if (held := [label(row) for row in rows if rule.holds(row)])
    ]
    shown = table(("kernel (grid × block):", *(name.replace("_", " ") for name in facts)), lines)
    return "\n\n".join(filter(None, ["**Inside the kernel**, by ncu:", shown, "\n".join(advice)]))


def _counted(name: str, record: Record | None) -> list[dict[str, Any]]:
    """ncu's rows of a kernel: it was asked for by this name, or its own name has it."""

    def fits(row: Mapping[str, Any]) -> bool:
        if "of" not in row:
            return name in str(row.get("kernel", ""))
        return bool(row["of"] == name or row["of"].startswith(f"{name}-"))  # a phase of it

    return [row for row in _rows(record) if fits(row)]


def _fact(value: object) -> str:
    return number(value) if isinstance(value, int | float) or value is None else str(value)


def _correctness(sources: Sources) -> str:
    record = sources.get("kernels")
    if record is None:
        return section("Correctness", missing("every kernel against its reference", command("kernels")))
    by_kernel: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record.rows:
        by_kernel.setdefault((row["kernel"], row["version"]), []).append(row)
    lines = [
        (*name, len(rows), max((r["error"] for r in rows if r.get("error") is not None), default=None),
         max(r["tolerance"] for r in rows), "right" if all(r["ok"] for r in rows) else "**wrong**")
        for name, rows in by_kernel.items()
    ]  # fmt: skip
    shown = [(*line[:3], *(f"{value:.1e}" if value else value for value in line[3:5]), line[5]) for line in lines]
    head = ("kernel:", "version:", "cases", "largest error", "tolerance", "verdict:")
    return section("Correctness", origin(record), table(head, shown), skipped(record))


def _intensity(sources: Sources) -> str:
    rows: list[dict[str, Any]] = []
    ceilings: dict[str, float] = {}
    for kind in SWEEPS:
        record = sources.get(kind)
        if record is not None:
            rows += [row for row in best_rows(record.rows) if row.get("flops")]
            ceilings |= record.ceilings
    if not rows:
        return ""
    text = "Below the bend memory binds, to its right the arithmetic units. Kernels that only copy have no place here."
    plot = sources.plot("roofline", plots.intensity_roofline(rows, ceilings), "Roofline of the kernels that compute")
    return section("All that compute, under one roof", text, plot)
