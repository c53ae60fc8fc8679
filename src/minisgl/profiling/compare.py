"""What was measured beside what was expected: reference figures, an earlier run, and the hardware's own limits.

Discrepancies come ranked by how many times they differ, each with its likely cause and the experiment that would tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from minisgl.profiling.expected import Figure, Reference
from minisgl.profiling.plausibility import check_reference
from minisgl.profiling.record import Record, new_record, read

Against = Literal["reference", "earlier run", "floor"]
Runs = Mapping[str, Record]  # by kind
REGRESSION = 0.05  # slower by more than this, beyond the spread of both runs
_DULL = ("vocab", "slots", "order")  # sizes that say little to a reader; rows name their order beside them
NEAR_FLOOR = 0.7  # a fraction of the limit that leaves minor tuning
# What a row measures; all else says what it is a measurement of.
MEASURES = frozenset(
    "us ms gbps tflops fraction floor_us limit algo_gbps bus_gbps start_us error copies gain low high detectable "
    "verdict rounds us_a us_b why value text claimed calls share_percent ok bytes flops".split()
)


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """A measurement that isn't what was expected; times in microseconds."""

    what: str
    against: Against
    measured_us: float
    expected_us: float
    cause: str
    next: str

    @property
    def ratio(self) -> float:
        """Measured over expected: above 1 is slower."""
        return self.measured_us / self.expected_us

    @property
    def size(self) -> float:
        """How many times the two differ, whichever is larger."""
        return max(self.ratio, 1 / self.ratio)


def load_runs(folder: Path) -> dict[str, Record]:
    """Every record in the folder, by kind; empty if there is none."""
    found = (read(path) for path in sorted(folder.glob("*.json")) if _is_record(path))
    return {record.kind: record for record in found}


def _is_record(path: Path) -> bool:
    with path.open(encoding="utf-8") as f:
        return '"schema"' in f.read(2_000_000) and not path.name.endswith("trace.json")


def compare(runs: Runs, reference: Reference, earlier: Runs | None = None) -> Record:
    """A record whose rows are the discrepancies, the largest first, and whose summary has the reference's errors."""
    found = [*_from_reference(runs, reference), *_from_floor(runs), *_regressions(runs, earlier or {})]
    found.sort(key=lambda d: d.size, reverse=True)
    record = new_record("compare", any(run.quick for run in runs.values()))
    if "env" in runs:  # the machine that is compared, wherever this is computed
        record = replace(record, hardware=runs["env"].hardware)
    for discrepancy in found:
        record.rows.append(asdict(discrepancy) | {"ratio": discrepancy.ratio})
    for figure in reference.figures:
        if figure.us is not None and _row_of(figure, runs) is None:
            record.skip(figure.what, "not measured in these runs")
    record.summary["reference"] = {"name": reference.name, "source": reference.source}
    record.summary["findings"] = [asdict(finding) for finding in check_reference(reference)]
    record.summary["regressions"] = sum(d.against == "earlier run" for d in found)
    return record


def median_us(row: Mapping[str, Any]) -> float | None:
    """The time of a row, if it has one above 0."""
    us = row.get("us", row.get("us_b"))  # of a ruling: what is claimed to be better
    us = us.get("median") if isinstance(us, Mapping) else us
    return float(us) if us else None


# -- reference figures -----------------------------------------------------------------------------------------------


def _from_reference(runs: Runs, reference: Reference) -> Iterator[Discrepancy]:
    flawed = {finding.figure: finding.text for finding in check_reference(reference)}
    for figure in reference.figures:
        found = _row_of(figure, runs)
        if figure.us is None or found is None:
            continue
        measured, row = found
        expected = min(max(measured, figure.us[0]), figure.us[1])
        if not expected or max(measured / expected, expected / measured) < 1 + REGRESSION:
            continue
        cause, step = _explain(figure, row, measured, expected, runs[figure.kind], flawed)
        yield Discrepancy(figure.what, "reference", measured, expected, cause, step)


def _row_of(figure: Figure, runs: Runs) -> tuple[float, dict[str, Any]] | None:
    """What these runs measured of a figure: microseconds and a row; the fastest of a kernel's rows."""
    record = runs.get(figure.kind)
    if record is None:
        return None
    if figure.summary:
        if record.summary.get("world") == 1:
            return None  # one rank communicates with nobody
        value = record.summary.get(figure.summary)
        scale = 1000.0 if figure.summary.endswith("_ms") else 1.0
        return None if not value else (float(value) * scale, {})
    if not figure.match:
        return None
    fits = [row for row in record.rows if _fits(row, figure.match) and row.get("version") != "copy"]
    timed = [(us, row) for row in fits if (us := median_us(row)) is not None]
    if figure.kind == "request":
        return _of_request(figure, timed)
    return min(timed, key=lambda pair: pair[0], default=None)


def _of_request(figure: Figure, timed: Sequence[tuple[float, dict[str, Any]]]) -> tuple[float, dict[str, Any]] | None:
    """A request's rows are pieces of operators: of a layer's the median layer, of others all, or the median piece."""
    layers: dict[int, float] = {}
    for us, row in timed:
        if row.get("layer") is not None:
            layers[row["layer"]] = layers.get(row["layer"], 0.0) + us
    if not timed or ("span" not in figure.match and not layers):
        return None
    if layers and not figure.each:
        return median(layers.values()), timed[0][1]
    pieces = [us for us, _ in timed]
    return median(pieces) if figure.each else sum(pieces), timed[0][1]


def _fits(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(_holds(row.get(key), value) for key, value in wanted.items())


def _holds(found: object, wanted: object) -> bool:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return _fits(found, wanted)
    return found in wanted if isinstance(wanted, list) else found == wanted


def _explain(
    figure: Figure, row: Mapping[str, Any], measured: float, expected: float, record: Record, flawed: Mapping[str, str]
) -> tuple[str, str]:
    """Likely cause, and the experiment that would tell."""
    if figure.host:
        return "host work: another processor, another implementation", "minisgl profile request, and its trace"
    if record.hardware.get("device") == "cpu":
        return "a CPU did the work of the reference's GPU", f"minisgl profile {figure.kind} on a GPU"
    if figure.id in flawed:
        return f"the reference can't be right: {flawed[figure.id]}", "measure on its hardware; trust bytes and time"
    if row.get("limit") == "launch" and measured < expected:
        return (
            f"the launch binds at this size ({row['floor_us']:.2f} µs here); the reference took far longer than its "
            "bytes need, as when each call is timed from the host",
            "time the same call from the host, launch by launch, beside the replay of a graph",
        )
    if figure.kind == "request":
        sizes = f"{record.summary.get('model', 'this model')}, {record.summary.get('prompt_tokens', '?')} tokens"
        return f"another model and prompt than the reference's, on other hardware: {sizes}", "minisgl profile step"
    if measured < expected:
        return "faster hardware, or a better kernel than the reference's", "compare fractions of each one's ceiling"
    if row.get("fraction", 0) >= NEAR_FLOOR:
        return "this GPU's ceiling is lower than the reference's", "minisgl profile env: compare the ceilings"
    return "the kernel is far from its floor", f"minisgl profile ncu --kernels {row.get('kernel', figure.kind)}"


# -- the hardware's own limits ---------------------------------------------------------------------------------------


def _from_floor(runs: Runs) -> Iterator[Discrepancy]:
    """The best version of each kernel where it is farthest from its floor, among sizes that the launch doesn't bind."""
    worst: dict[str, tuple[float, dict[str, Any]]] = {}
    for record in runs.values():
        for row in best_rows(record.rows):
            fraction = row["fraction"]
            if row["limit"] != "launch" and fraction < min(NEAR_FLOOR, worst.get(row["kernel"], (1.0,))[0]):
                worst[row["kernel"]] = fraction, row
    for kernel, (_, row) in worst.items():
        cause, step = _short_of(row)
        what = f"{kernel} {row['version']}, {case_text(row['case'])}"
        yield Discrepancy(what, "floor", median_us(row) or row["floor_us"], row["floor_us"], cause, step)


def _short_of(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["limit"] in ("HBM", "L2") and row["bytes"] < 16 << 20:
        return (
            "too few bytes to fill the memory's pipeline: latency on the way in and out of the kernel",
            "minisgl profile ncu: stalls on loads; fuse it with a neighbour, or overlap it by dependent launch",
        )
    if row["limit"] == "compute":
        return "tiles or pipelines that leave the matrix units idle", "minisgl profile ncu: pipe utilisation, occupancy"
    if row["limit"] == "cpu":
        return "one of several cores, or a scattered access", "minisgl profile env, and the same with more threads"
    return "accesses that aren't coalesced, or too few in flight", "minisgl profile ncu: sectors a request, L2 hit rate"


def best_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel, case and dtype, the fastest of this project's own versions, those with tuned configuration."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("version") in (None, "copy", "torch") or row.get("config") or "fraction" not in row:
            continue
        key = repr((row["kernel"], sorted(row["case"].items()), row.get("dtype")))
        if median_us(row) and (key not in best or (median_us(row) or 0) < (median_us(best[key]) or math.inf)):
            best[key] = row
    return list(best.values())


def case_text(case: Mapping[str, Any] | None) -> str:
    """Sizes in words: 'tokens 64, width 4096'."""
    told = (f"{name.replace('_', ' ')} {value}" for name, value in (case or {}).items() if name not in _DULL)
    return ", ".join(told) or "all cases"


# -- an earlier run --------------------------------------------------------------------------------------------------


def _regressions(runs: Runs, earlier: Runs) -> Iterator[Discrepancy]:
    for kind, old in earlier.items():
        new = runs.get(kind)
        if new is None or new.hardware.get("name") != old.hardware.get("name"):
            continue  # another machine's times say nothing about a change
        before = {_key(row): row for row in old.rows}
        for row in new.rows:
            then = before.get(_key(row))
            if then is not None and _slower(row, then):
                what = f"{kind}: {_label(row)}"
                cause = f"a change between {old.commit} and {new.commit}" + " (a quick run is no proof)" * new.quick
                now_us, then_us = median_us(row) or 0.0, median_us(then) or 0.0
                step = f"git bisect {old.commit.rstrip('+')}..{new.commit.rstrip('+')}"
                yield Discrepancy(what, "earlier run", now_us, then_us, cause, step)


def _key(row: Mapping[str, Any]) -> str:
    return repr(sorted((name, value) for name, value in row.items() if name not in MEASURES))


def _label(row: Mapping[str, Any]) -> str:
    parts = [str(row[name]) for name in ("kernel", "version", "op", "path", "span", "operator") if row.get(name)]
    return ", ".join([*parts, *([case_text(row["case"])] if row.get("case") else [])])


def _slower(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    now, then = median_us(new), median_us(old)
    if now is None or then is None or now <= then * (1 + REGRESSION):
        return False
    if isinstance(new["us"], Mapping) and isinstance(old["us"], Mapping):
        return bool(new["us"].get("p10", now) > old["us"].get("p90", then))
    return True
