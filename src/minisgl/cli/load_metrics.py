"""From when things arrived to TTFT, ITL, TPOT, throughput and goodput. docs/bench.md says why each is as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from minisgl.types import ConfigError

PERCENTILES = {"median": 50.0, "p90": 90.0, "p99": 99.0}
LATENCIES = ("ttft", "tpot", "itl", "e2e")
GOALS = ("ttft", "tpot", "e2e")  # a request has one of each


@dataclass(slots=True)
class Sample:
    """One request as the client saw it. Times are seconds on one clock."""

    start: float  # just before the connection was opened
    times: list[float] = field(default_factory=list)  # when each chunk with some of the answer arrived
    end: float = 0.0  # when the last chunk of the answer, or the error, arrived
    prompt_tokens: int | None = None  # None: the server didn't say
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token: to the first chunk with some of the answer."""
        return self.times[0] - self.start if self.times else None

    @property
    def e2e(self) -> float:
        """End-to-end latency."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first."""
        if not self.times or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.end - self.times[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between chunks."""
        return [later - earlier for earlier, later in pairwise(self.times)]

    def meets(self, goals: Mapping[str, float]) -> bool:
        """Whether it ended well and within each of `goals` (seconds by name). What it has no value of, it meets."""
        values = {name: getattr(self, name) for name in goals}
        return self.error is None and all(value is None or value <= goals[name] for name, value in values.items())


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks of sorted values (NumPy's default)."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(seconds: Iterable[float]) -> dict[str, float] | None:
    """Mean, median, p90 and p99 in milliseconds; None of nothing."""
    ordered = sorted(1e3 * value for value in seconds)
    if not ordered:
        return None
    found = {"mean": sum(ordered) / len(ordered)}
    found |= {name: percentile(ordered, percent) for name, percent in PERCENTILES.items()}
    return {name: round(value, 3) for name, value in found.items()}


def summarise(samples: Sequence[Sample], goals: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a run. Rates are per second, from the first request's start to the last one's end.

    Args:
        goals: what goodput asks of a request, in seconds by name.
    """
    good = [s for s in samples if s.error is None]
    duration = max(s.end for s in samples) - min(s.start for s in samples)
    counted = [s for s in good if s.output_tokens is not None]
    summary: dict[str, Any] = {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "errors": dict(Counter(s.error for s in samples if s.error is not None).most_common(5)),
        "seconds": round(duration, 4),
        "requests_per_second": round(len(good) / duration, 3),
        **_token_figures(good, counted, duration),
        "ttft_ms": spread(s.ttft for s in good if s.ttft is not None),
        "tpot_ms": spread(s.tpot for s in good if s.tpot is not None),
        "itl_ms": spread(gap for s in good for gap in s.itl),
        "e2e_ms": spread(s.e2e for s in good),
    }
    if goals:
        met = sum(s.meets(goals) for s in samples)
        summary["goodput"] = {
            "goals_ms": {name: round(1e3 * value, 3) for name, value in goals.items()},
            "requests_per_second": round(met / duration, 3),
            "fraction": round(met / len(samples), 4),
        }
    return summary


def _token_figures(good: Sequence[Sample], counted: Sequence[Sample], duration: float) -> dict[str, Any]:
    """Figures that need the server's count of tokens; None unless every answer came with one."""
    names = ("prompt_tokens", "cached_tokens", "output_tokens")
    figures: dict[str, Any] = {}
    for name in names:
        values = [getattr(s, name) for s in good]
        figures[name] = sum(values) if values and None not in values else None
    output, prompt = figures["output_tokens"], figures["prompt_tokens"]
    figures["output_tokens_per_second"] = None if output is None else round(output / duration, 2)
    known = output is not None and prompt is not None
    figures["tokens_per_second"] = round((output + prompt) / duration, 2) if known else None
    num_chunks = sum(len(s.times) for s in counted)
    total = sum(s.output_tokens or 0 for s in counted)
    figures["tokens_per_chunk"] = round(total / num_chunks, 3) if num_chunks else None
    return figures


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """`["ttft:200", "tpot:50"]`, milliseconds, to seconds by name.

    Raises:
        ConfigError: an unknown name, or no number above 0.
    """
    goals = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            seconds = float(value) / 1e3
        except ValueError:
            seconds = 0.0
        if name not in GOALS or not 0 < seconds < float("inf"):
            raise ConfigError(f"goodput is {text!r}; expected {', '.join(GOALS)} with milliseconds, as in ttft:200")
        goals[name] = seconds
    return goals
