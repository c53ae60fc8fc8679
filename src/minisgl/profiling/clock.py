"""Timing calls, on a GPU from CUDA graphs or by events, on a CPU by the clock; and the spread of what came out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

LONG_ENOUGH_S = 1e-4  # for a clock that costs a tenth of a microsecond


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def time_call(call: Callable[[], object], device: str, repeat: int) -> list[float]:
    """Seconds of each of `repeat` calls, after two to warm up."""
    times = []
    for _ in range(repeat + 2):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return times[2:]


def turns_us(calls: Sequence[Callable[[], object]], samples: int) -> list[float]:
    """Microseconds a call on the CPU: `calls` take turns, and a sample is as many calls as the clock needs."""
    turn = itertools.cycle(calls)
    for call in calls[:2]:
        call()
    began = time.perf_counter()
    next(turn)()
    count = max(1, int(LONG_ENOUGH_S / max(time.perf_counter() - began, 1e-9)))
    times = []
    for _ in range(samples):
        began = time.perf_counter()
        for call in itertools.islice(turn, count):
            call()
        times.append((time.perf_counter() - began) / count * 1e6)
    return times


def calls_us(calls: Sequence[Callable[[], object]], device: str, samples: int) -> list[float]:
    """Microseconds a call of `calls`, which differ in their data alone: from a CUDA graph, or in turns on a CPU."""
    if device == "cpu":
        return turns_us(calls, samples)
    from minisgl.profiling.replay import replay_us

    return replay_us(calls, samples)
