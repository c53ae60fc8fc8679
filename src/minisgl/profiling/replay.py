"""Timing kernels as they run in the engine: from a CUDA graph, over data that isn't in the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minisgl.hardware import detect
from minisgl.kernels.spec import KernelSpec, Shape


def replay_us(calls: Sequence[Callable[[], object]], samples: int = 15) -> list[float]:
    """Microseconds a call, for each of `samples` replays of a graph that holds all of `calls` in a row."""
    calls[0]()  # compiles and allocates what a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times = []
    for _ in range(samples + 2):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return times[2:]


def cold_inputs(spec: KernelSpec, shape: Shape, dtype: torch.dtype, most: int = 4096) -> list[tuple[Any, ...]]:
    """Arguments of as many calls as together move three times the L2 cache, so that none finds its own there.

    At most `most`, for a graph of bearable size: below 40 kB a call, a part of the data may be warm.
    """
    hardware = detect().cuda
    assert hardware is not None
    copies = min(max(-(-3 * hardware.l2_bytes // spec.cost(shape, dtype)[0]), 4), most)
    device = torch.device("cuda")
    return spec.inputs(shape, dtype, device, torch.Generator(device).manual_seed(0), copies)
