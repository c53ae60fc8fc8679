"""A ruling on every claim: interleaved A/B measurements in one run, an interval, and a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from minisgl.profiling.expected import Arm, Claim
from minisgl.profiling.experiments import EXPERIMENTS, NotMeasurable
from minisgl.profiling.record import Record, new_record
from minisgl.profiling.statistics import FEWEST_ROUNDS, Gain, gain_of, interleave, pooled_gain
from minisgl.types import KernelError

Verdict = Literal["confirmed", "refuted", "no difference", "not measurable here"]
Times = tuple[Sequence[float], Sequence[float]]  # microseconds of A and of B, by round
ROUNDS = 15


def judge(gain: Gain, claimed: tuple[float | None, float | None]) -> Verdict:
    """What a measured gain says about a claimed range of gains.

    A claim of a gain that the interval misses is refuted; one that it touches is confirmed if the interval also leaves
    out zero, else nothing was told from no difference. A claim of no gain ('at most 2%') is confirmed only by an
    interval that lies within it.
    """
    low, high = (-math.inf if claimed[0] is None else claimed[0]), (math.inf if claimed[1] is None else claimed[1])
    if gain.high < low or gain.low > high:
        return "refuted"
    if low <= gain.low and gain.high <= high:
        return "confirmed"
    claims_nothing = low < 0 <= high
    return "confirmed" if gain.clear and not claims_nothing else "no difference"


def rule(claims: Sequence[Claim], quick: bool, report: Callable[[str], None] = print) -> Record:
    """Measures every claim and rules on it; quick takes five rounds, and one case of each claim."""
    record = new_record("rulings", quick)
    for claim in claims:
        rows = list(rule_on(claim, FEWEST_ROUNDS if quick else ROUNDS, quick))
        record.rows.extend(rows)
        if rows[-1]["verdict"] == "not measurable here":
            record.skip(claim.id, rows[-1]["why"])
        report(describe(rows[-1]))
    return record


def rule_on(claim: Claim, rounds: int, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each case, then one for the claim: the cases pooled, each with the same weight.

    A case that can't be measured is left out; if none can, the only row says why.
    """
    measured: list[Times] = []
    why = ""
    for case in claim.cases[:1] if quick else claim.cases:
        try:
            with EXPERIMENTS[claim.experiment](claim, case) as (a, b):
                samples = interleave({"a": a, "b": b}, rounds)
        except (NotMeasurable, KernelError) as error:
            why = str(error)
            continue
        measured.append((samples["a"], samples["b"]))
        yield _row(claim, case, measured[-1:])
    if measured:
        yield _row(claim, None, measured)
    else:
        yield {**named(claim, None), "verdict": "not measurable here", "why": why}


def _row(claim: Claim, case: dict[str, Any] | None, times: Sequence[Times]) -> dict[str, Any]:
    gain = gain_of(*times[0]) if len(times) == 1 else pooled_gain(times)
    row = named(claim, case) | {
        "gain": gain.estimate,
        "low": gain.low,
        "high": gain.high,
        "detectable": gain.detectable,
        "rounds": gain.rounds,
        "verdict": judge(gain, claim.gain),
    }
    if len(times) == 1:
        row |= {"us_a": _spread(times[0][0]), "us_b": _spread(times[0][1])}
    return row


def named(claim: Claim, case: dict[str, Any] | None) -> dict[str, Any]:
    """What a row says of its claim, whatever was measured; `case` is None in the row of the claim as a whole."""
    return {
        "claim": claim.id,
        "text": claim.text,
        "claimed": list(claim.gain),
        "a": claim.a.name,
        "b": claim.b.name,
        "kernels": sorted({call.kernel for arm in _arms(claim) for call in arm.calls}),
        "case": case,
    }


def _arms(claim: Claim) -> tuple[Arm, Arm]:
    return claim.a, claim.b


def _spread(times: Sequence[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]}


def describe(row: dict[str, Any]) -> str:
    """A row in one line: verdict, claim, and what was measured."""
    line = f"{row['verdict']:20} {row['text']}"
    return f"{line}: {row['why']}" if "gain" not in row else f"{line}: {measured(row)}"


def measured(row: dict[str, Any]) -> str:
    """The gain of a row, its interval and, where no difference was found, what would have been, if that is known."""
    text = f"{_signed(row['gain'])} ({_signed(row['low'])} to {_signed(row['high'])})"
    known = row["verdict"] == "no difference" and "detectable" in row
    return text + (f", detectable: {row['detectable']:.1%}" if known else "")


def _signed(gain: float) -> str:
    return f"{gain:+.1%}" if abs(gain) >= 0.001 else f"{gain:+.3%}"
