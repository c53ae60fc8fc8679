"""Times every path of an all-reduce on the ranks at hand, from CUDA graphs, as the engine runs them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from minisgl.distributed.allreduce import AllReduce, Run, view_of
from minisgl.distributed.paths import Machine, PathTable, keep_table, load_table
from minisgl.distributed.torch_comm import TorchCommunicator, broadcast_bytes
from minisgl.timing import collector_off

SIZES = tuple(1 << k for k in range(10, 27, 2))  # bytes: 1 KiB, 4 KiB … 64 MiB
SAMPLES = 3
_LONG = 4 << 20  # bytes from which one call in a graph is long enough to time
Times = Mapping[str, Mapping[int, float]]  # path → bytes → microseconds


def agreed_table(host: TorchCommunicator, rank: int, machine: Machine, measure: Callable[[], Times]) -> PathTable:
    """Rank 0's table on every rank: what it kept of an earlier start, else what all measure now."""
    known = load_table(machine) if rank == 0 else None
    text = broadcast_bytes(host, known.to_json() if known else b"")
    if not text:
        table = PathTable(machine, measure())
        if rank == 0:
            keep_table(table)
        text = broadcast_bytes(host, table.to_json())
    return PathTable.from_json(text)


def measure(reduce: AllReduce, device: torch.device) -> Times:
    """Every path at every size that it can take, up to the largest of `SIZES`. Collective."""
    scratch = torch.zeros(SIZES[-1], dtype=torch.uint8, device=device)
    us = {}
    for path, run in reduce.paths.items():
        place, limit = reduce.places.get(path, scratch), reduce.limit(path)
        us[path] = {n: time_path(run, view_of(place, (n // 2,), torch.bfloat16)) for n in SIZES if n <= limit}
    return us


def time_path(run: Run, x: torch.Tensor) -> float:
    """Microseconds of `run(x)`: the median of a few replays. Zeros stay zeros, however often they are added up."""
    x.zero_()
    run(x)
    calls = 2 if x.nbytes >= _LONG else 8
    graph = capture(lambda: run(x), calls)
    times = [replay_us(graph) / calls for _ in range(SAMPLES + 1)]
    return max(statistics.median(times[1:]), 1e-3)


def capture(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls. What `call` allocates or compiles, it must have done before."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with collector_off(), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(calls):
            call()
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
