"""Rulings on collectives where the run of the claims had one GPU: from timings that a run on several has recorded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minisgl.profiling.collective_arms import FIXED_BYTES
from minisgl.profiling.expected import Claim, load_claims
from minisgl.profiling.record import Record
from minisgl.profiling.report.sources import Sources
from minisgl.profiling.rulings import judge, named
from minisgl.profiling.statistics import Gain

MARK = "from recorded timings of the collectives, not interleaved"
Times = Mapping[str, float]  # median, p10 and p90 in microseconds


def ruled(sources: Sources) -> Record | None:
    """The rulings; claims on collectives that they couldn't measure are ruled on by the record of the collectives.

    Rows of those have `recorded`, which says so, instead of a number of rounds and a detectable effect.
    """
    record, comm = sources.get("rulings"), sources.get("comm")
    if record is None or not record.rows or comm is None or not _of_several_gpus(comm):
        return record
    rows = list(record.rows)
    for claim in load_claims():
        mine = [row for row in rows if row["claim"] == claim.id]
        if claim.experiment != "collective" or any("gain" in row for row in mine):
            continue
        if found := _rule_on(claim, comm):
            at = rows.index(mine[0]) if mine else len(rows)
            rows[at : at + len(mine)] = found
    return replace(record, rows=rows)


def _of_several_gpus(comm: Record) -> bool:
    return comm.hardware.get("device") == "cuda" and comm.summary.get("world", 1) > 1


def _rule_on(claim: Claim, comm: Record) -> list[dict[str, Any]]:
    """A row for each case that was timed with both arms, then the claim's; none where no case was."""
    rows = []
    for case in claim.cases:
        a, b = (_timed(comm, str(arm.path), case["bytes"]) for arm in (claim.a, claim.b))
        if a and b:
            rows.append(_row(claim, case, _gain(a, b)) | {"us_a": dict(a), "us_b": dict(b)})
    return [*rows, _row(claim, None, _pooled(rows))] if rows else []


def _timed(comm: Record, arm: str, num_bytes: int) -> Times | None:
    """An arm's times: `fixed` goes by the threshold, `measured` by the choice that the record tells."""
    path: str | None = arm
    if arm == "fixed":
        path = "registered_copy" if num_bytes <= FIXED_BYTES else "direct"
    elif arm == "measured":
        path = next((name for limit, name in comm.summary.get("chosen", ()) if num_bytes <= limit), None)
    wanted = ("all_reduce", path, num_bytes, comm.summary["world"])
    found = (row["us"] for row in comm.rows if tuple(row[k] for k in ("op", "path", "bytes", "world")) == wanted)
    us = next(found, None)
    return us if us and {"p10", "p90"} <= us.keys() else None


def _gain(a: Times, b: Times) -> tuple[float, float, float]:
    """Estimate, low and high: of medians; and of A's p10 over B's p90, A's p90 over B's p10, the widest of the two."""
    return a["median"] / b["median"] - 1, a["p10"] / b["p90"] - 1, a["p90"] / b["p10"] - 1


def _pooled(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Geometric means over the cases, each with the same weight; of the bounds too, so never narrower than they are."""
    low, high = (math.exp(statistics.fmean(math.log1p(row[key]) for row in rows)) - 1 for key in ("low", "high"))
    return math.exp(statistics.fmean(math.log1p(row["gain"]) for row in rows)) - 1, low, high


def _row(claim: Claim, case: dict[str, Any] | None, gain: tuple[float, float, float]) -> dict[str, Any]:
    estimate, low, high = gain
    verdict = judge(Gain(estimate, low, high, math.inf, 0), claim.gain)
    told = {"gain": estimate, "low": low, "high": high, "verdict": verdict, "recorded": MARK}
    return named(claim, case) | told
