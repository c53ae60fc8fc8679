"""Timing kernels as they run in the engine: from a CUDA graph, over data that isn't in the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minisgl.distributed.probe import replay_us as time_us
from minisgl.hardware import detect
from minisgl.kernels.spec import KernelSpec, Shape
from minisgl.timing import collector_off

LONG_ENOUGH_US = 2000.0  # a replay costs a few microseconds by itself
MOST_CALLS = 4096


def _graph(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with collector_off(), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayer(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Captures all `calls` in a row, over again if need be; what it returns replays them: microseconds a call."""
    calls[0]()  # compiles and allocates what a capture must not
    graph = _graph(calls)
    time_us(graph)
    wanted = int(LONG_ENOUGH_US / time_us(graph)) + 1
    repeats = max(min(wanted, MOST_CALLS // len(calls)), 1)
    if repeats > 1:
        graph = _graph([*calls] * repeats)
    return lambda: time_us(graph) / (len(calls) * repeats)


def replay_us(calls: Sequence[Callable[[], object]], samples: int = 15) -> list[float]:
    """Microseconds a call, for each of `samples` replays of a graph of all `calls`, after two that don't count."""
    take = replayer(calls)
    return [take() for _ in range(samples + 2)][2:]


def cold_copies(spec: KernelSpec, shape: Shape, dtype: torch.dtype, most: int = 4096) -> int:
    """How many sets of arguments together move three times the L2 cache, so that no call finds its own data there.

    At most `most`, for a graph of bearable size: below 40 kB a call, a part of the data may be warm.
    """
    hardware = detect().cuda
    assert hardware is not None
    return min(max(-(-3 * hardware.l2_bytes // spec.cost(shape, dtype)[0]), 4), most)


def rotated_inputs(
    spec: KernelSpec, shape: Shape, dtype: torch.dtype, copies: int, device: torch.device | None = None
) -> list[tuple[Any, ...]]:
    """That many sets of random arguments, on the GPU unless `device` says otherwise."""
    device = device or torch.device("cuda")
    return spec.inputs(shape, dtype, device, torch.Generator(device).manual_seed(0), copies)
