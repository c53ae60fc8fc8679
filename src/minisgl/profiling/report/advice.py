"""What follows from the figures: opportunities, rulings on claims, discrepancies, conclusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.profiling.compare import best_rows, case_text
from minisgl.profiling.expected import load_claims
from minisgl.profiling.record import Record
from minisgl.profiling.report import plots
from minisgl.profiling.report.collectives import MARK, ruled
from minisgl.profiling.report.kernels import SWEEPS, classify
from minisgl.profiling.report.markdown import (
    lookup,
    missing,
    number,
    origin,
    percent,
    section,
    size,
    spread,
    table,
    words,
)
from minisgl.profiling.report.sources import Sources, command
from minisgl.profiling.rulings import measured
from minisgl.profiling.spans import short_name

MOST_ROWS = 20  # of a ranked list
_ENGINE = {claim.id: claim.engine for claim in load_claims()}


def classes(sources: Sources) -> list[tuple[str, str]]:
    """Each kernel measured and its class."""
    found = []
    for kind in SWEEPS:
        rows = best_rows(record.rows) if (record := sources.get(kind)) else []
        for name in dict.fromkeys(row["kernel"] for row in rows):
            found.append((name, classify([row for row in rows if row["kernel"] == name])))
    return found


def opportunities(sources: Sources) -> str:
    """Ranked: what a decode step could lose, and what rulings have shown to gain."""
    step = sources.get("step")
    step = None if step is None or sources.stands_in(step) else step  # another machine's
    found = [*_step_opportunities(step), *_ruled_opportunities(ruled(sources))]
    title = "Opportunities, by priority"
    settled = _settled(ruled(sources))
    if not found:
        what = missing("a decode step and the rulings", "minisgl profile step; minisgl profile rulings")
        what = missing("a decode step", command("step")) if settled else what
        return section(title, what, settled)
    found.sort(key=lambda item: item[0], reverse=True)
    lines = [(i + 1, *item[1:]) for i, item in enumerate(found[:MOST_ROWS])]
    text = (
        "Shares of a step are what is left above the floor, so at most what can be gained; ruled gains were measured, "
        "on the kernel. Effort: small is a choice of version, medium a fusion or a launch less, large another kernel."
    )
    return section(title, text, table(("", "what:", "gain:", "effort:", "why:"), lines), settled)


def _step_opportunities(record: Record | None) -> list[tuple[float, str, str, str, str]]:
    whole = lookup(record, "step_us")
    if record is None or not whole:
        return []
    found = []
    for row in record.rows:
        left = (row["us"] - (row.get("floor_us") or 0.0)) / whole
        if left >= 0.01:
            why = f"{number(row['us'])} µs, floor {number(row.get('floor_us') or 0.0)}"
            near = (row.get("fraction") or 0.0) >= 0.5
            found.append((left, f"{row['operator']} ({short_name(row['kernel'])})", f"up to {percent(left)} of a step",
                          "medium" if near else "large", why))  # fmt: skip
    gaps = (lookup(record, "gaps_us") or 0.0) / whole
    if gaps >= 0.01:
        found.append((gaps, "gaps between kernels", f"up to {percent(gaps)} of a step", "medium", "launches in a row"))
    return found


def _ruled_opportunities(record: Record | None) -> list[tuple[float, str, str, str, str]]:
    return [
        (row["low"] / 10, f"{row['b']} instead of {row['a']}", _told(row), "small", f"ruling {row['claim']}")
        for row in _gains(record)
        if not _ENGINE.get(row["claim"])
    ]


def _gains(record: Record | None) -> list[dict[str, Any]]:
    """Rulings that showed a gain, whether or not as large as was claimed."""
    return [row for row in record.rows if row["case"] is None and row.get("low", 0.0) > 0.01] if record else []


def _settled(record: Record | None) -> str:
    """Gains that are no opportunity, since the engine has them, or why it hasn't."""
    told = [
        f"- {row['b']} instead of {row['a']}, {_told(row)}: {_ENGINE[row['claim']]}."
        for row in _gains(record)
        if _ENGINE.get(row["claim"])
    ]
    return "Ruled on and settled:\n\n" + "\n".join(told) if told else ""


def _told(row: Mapping[str, Any]) -> str:
    """The measured gain of a ruling; and that it wasn't measured in turns, where it wasn't."""
    return "; ".join(filter(None, [measured(dict(row)), row.get("recorded")]))


def rulings(sources: Sources) -> str:
    title = "Rulings on claims"
    record = ruled(sources)
    if record is None or not record.rows:
        return section(title, missing("the claims", command("rulings")))
    pooled = [row for row in record.rows if row["case"] is None]
    lines = [
        (row["text"], f"**{row['verdict']}**", measured(row) if "gain" in row else "–", row.get("rounds", "–"),
              row.get("why", f"{row['b']} (B) against {row['a']} (A){_marked(row, record.rows)}")) for row in pooled
    ]  # fmt: skip
    text = (
        "Interleaved A/B measurements of one run; the gain is time of A over time of B less one, with its 95% interval."
    )
    parts = [origin(record), text, _of_collectives(record, sources)]
    if any("gain" in row for row in pooled):
        parts.append(sources.plot("rulings", plots.ruling_intervals(record.rows), "Gains with their intervals"))
    cases = [
        (_claim(row), case_text(row["case"]), spread(row["us_a"]), spread(row["us_b"]), measured(row), row["verdict"])
        for row in record.rows
        if row["case"] is not None
    ]
    parts.append(table(("claim:", "verdict:", "gain (interval):", "rounds", "arms:"), lines))
    if cases:
        head = ("claim:", "case:", "A µs (p10–p90)", "B µs (p10–p90)", "gain (interval):", "verdict:")
        parts.append("Case by case:\n\n" + table(head, cases))
    return section(title, *parts)


def _claim(row: Mapping[str, Any]) -> str:
    return f"{row['claim']} (recorded)" if "recorded" in row else str(row["claim"])


def _marked(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Behind a ruling from recorded timings: that it is one, and where it doesn't hold, since it pools its cases."""
    if "recorded" not in row:
        return ""
    others = [each for each in rows if each["claim"] == row["claim"] and each["verdict"] != row["verdict"]]
    apart = words([f"{each['verdict']} at {size(each['case']['bytes'])}" for each in others])
    return f"; {row['recorded']}" + (f"; {apart}" if apart else "")


def _of_collectives(record: Record, sources: Sources) -> str:
    """How rulings from recorded timings came about, and on which machine."""
    comm = sources.get("comm")
    if comm is None or not any("recorded" in row for row in record.rows):
        return ""
    return (
        f"Rulings on collectives are {MARK}: the run of the claims couldn't measure them. They compare the medians "
        f"that `{command('comm')}` recorded on {comm.summary['world']} GPUs; their interval goes from A's p10 over B's "
        f"p90 to A's p90 over B's p10, and isn't one of confidence. {origin(comm)}"
    )


def discrepancies(sources: Sources) -> str:
    title = "Expected and measured"
    record = sources.get("compare")
    if record is None:
        return section(title, missing("runs beside expected figures", command("compare")))
    findings = [(f["severity"], f["figure"], f["text"]) for f in record.summary.get("findings", [])]
    reference = f"The reference: {record.summary['reference']['source']}."
    parts = [origin(record), reference]
    if findings:
        parts.append("What can't be in it:\n\n" + table(("severity:", "figure:", "why:"), findings))
    lines = [
        (row["what"], row["against"], number(row["measured_us"]), number(row["expected_us"]),
         f"{number(row['ratio'])}×", row["cause"], row["next"])
        for row in record.rows[:MOST_ROWS]
    ]  # fmt: skip
    head = ("what:", "against:", "measured µs", "expected µs", "ratio", "likely cause:", "next experiment:")
    parts.append("Discrepancies, the largest first:\n\n" + table(head, lines) if lines else "Nothing differs.")
    return section(title, *parts)


def conclusions(sources: Sources) -> str:
    points = []
    found = classes(sources)
    for word in ("launch", "bandwidth", "compute"):
        names = [name for name, text in found if text.lower().startswith(word)]
        if names:
            points.append(f"{word.capitalize()}-bound at most sizes, by the roofline: {words(names)}.")
    record = ruled(sources)
    rows = record.rows if record else []
    for verdict in ("confirmed", "refuted", "no difference"):
        held = [row for row in rows if row["case"] is None and row["verdict"] == verdict]
        points += [f"{verdict.capitalize()}: {row['text']} ({measured(row)}{_marked(row, rows)})." for row in held]
    gaps, whole = lookup(sources.get("step"), "gaps_us"), lookup(sources.get("step"), "step_us")
    if gaps is not None and whole:
        mark = sources.mark("step")
        points.append(f"Gaps take {percent(gaps / whole)} of a decode step{mark}.")
    kinds = ("index", "store", "attention", "comm", "request", "step", "load", "ncu")
    absent = [kind for kind in kinds if not _has(sources, kind)]
    if absent:
        points.append(
            f"Not measured yet: {words(absent)}; scripts/06_full_pipeline.sh measures all that a machine can."
        )
    return section("Conclusions", "\n".join(f"- {point}" for point in points))


def _has(sources: Sources, kind: str) -> bool:
    record: Mapping[str, Any] | Record | None = sources.get(kind)
    return isinstance(record, Record) and bool(record.rows) and not sources.stands_in(record)
