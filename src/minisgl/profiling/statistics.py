"""Statistics of interleaved A/B measurements: a gain, its confidence interval, and the gain that would have shown.

Arms are run in turns, so that clocks, temperature and neighbours that drift change both. A round gives one ratio of
times; the mean of their logarithms has a Student interval. Nothing is assumed of the times but that rounds are alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95
POWER = 0.8  # chance that a gain of the detectable size is told from none
FEWEST_ROUNDS = 5
_STEPS = 2000  # of the integral below; even


@dataclass(frozen=True, slots=True)
class Gain:
    """How much faster B is than A: time of A / time of B - 1, so 0.1 is ten per cent faster and below 0 is slower.

    Args:
        low, high: the interval that holds the gain with 95% confidence.
        detectable: the gain that as many rounds of this noise would tell from none in four of five runs.
        rounds: ratios that it rests on.
    """

    estimate: float
    low: float
    high: float
    detectable: float
    rounds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 'no difference'."""
        return not self.low <= 0.0 <= self.high


def gain_of(a: Sequence[float], b: Sequence[float]) -> Gain:
    """The gain of B over A from times of the same rounds, in any unit.

    Raises:
        ValueError: not as many of the one as of the other, fewer than five rounds, or a time that isn't above 0.
    """
    if len(a) != len(b) or len(a) < FEWEST_ROUNDS:
        raise ValueError(f"{len(a)} times of A and {len(b)} of B; expected as many of each, at least {FEWEST_ROUNDS}")
    if min(*a, *b) <= 0:
        raise ValueError("a time isn't above 0: the clock is too coarse for one sample, so make the sample longer")
    return _gain_of_logs([math.log(x / y) for x, y in zip(a, b, strict=True)])


def pooled_gain(cases: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Gain:
    """The gain over several cases, each weighing the same: in a round, the geometric mean of the cases' ratios.

    Raises:
        ValueError: as `gain_of`, or the cases have different numbers of rounds.
    """
    for a, b in cases:
        gain_of(a, b)
    ratios = [[math.log(x / y) for x, y in zip(a, b, strict=True)] for a, b in cases]
    return _gain_of_logs([statistics.fmean(round_) for round_ in zip(*ratios, strict=True)])


def _gain_of_logs(logs: Sequence[float]) -> Gain:
    rounds = len(logs)
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(rounds)
    half = student_quantile((1 + CONFIDENCE) / 2, rounds - 1) * error
    least = half + student_quantile(POWER, rounds - 1) * error
    return Gain(math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half), math.expm1(least), rounds)


@cache
def student_quantile(p: float, df: int) -> float:
    """The value that Student's t with `df` degrees of freedom stays below with probability `p`, 0.5 to 0.9999."""
    low, high = 0.0, 1.0
    while _student_above_zero(high, df) < p - 0.5:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_above_zero(middle, df) < p - 0.5 else (low, middle)
    return high


def _student_above_zero(t: float, df: int) -> float:
    """Probability between 0 and `t`: Simpson's rule over the density."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)

    def density(x: float) -> float:
        return float((1 + x * x / df) ** (-(df + 1) / 2))

    h = t / _STEPS
    inner = sum((4 if i % 2 else 2) * density(i * h) for i in range(1, _STEPS))
    return scale * (density(0) + inner + density(t)) * h / 3


def interleave(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One sample of each arm a round, in turns that change direction, after a round that doesn't count.

    Args:
        arms: by name, what takes a sample and returns its time.

    Returns:
        The samples of each arm, in the order of the rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            taken = arms[name]()
            if number:
                samples[name].append(taken)
    return samples
