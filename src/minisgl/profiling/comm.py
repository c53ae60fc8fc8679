"""Collectives by operation, path and size, on the ranks of this machine; and what they add to a decode step.

Bandwidths are those of NVIDIA's nccl-tests (its PERFORMANCE.md): the algorithm's is bytes over time, where the bytes
are those of the tensor that every rank ends up with; the bus's is that times 2(n − 1)/n for an all-reduce over n ranks
and (n − 1)/n for an all-gather, which is what each rank's link carries.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.distributed.allreduce import AllReduce, view_of
from minisgl.distributed.paths import ANYWHERE, Machine, PathTable, keep_table
from minisgl.distributed.probe import capture, measure, replay_us
from minisgl.hardware import detect
from minisgl.models.registry import read_config
from minisgl.profiling.ceilings import memory_bandwidth
from minisgl.profiling.clock import spread
from minisgl.profiling.comm_tables import ranges
from minisgl.profiling.floor import body_parameters
from minisgl.profiling.ranks import run_ranks
from minisgl.profiling.record import Record, new_record
from minisgl.profiling.roofline import gbps
from minisgl.profiling.shapes import SHAPES, shape_folder
from minisgl.types import CommunicationError, ConfigError

SIZES = tuple(1 << k for k in range(10, 27))  # 1 KiB … 64 MiB
QUICK_SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 23)
BATCHES = (1, 8, 64, 256)
BATCH = 64  # of those, the one that `layer_us` and `token_us` of the summary are for
Row = dict[str, Any]


# -- this process: the command -------------------------------------------------------------------------------------


def default_world() -> int:
    """As many ranks as there are GPUs, up to the largest power of two; on a CPU two."""
    if detect().cuda is None:
        return 2
    return 1 << (int(torch.cuda.device_count()).bit_length() - 1)


def run(world: int, model: str, quick: bool) -> Record:
    """Measures with `world` ranks and returns the record.

    Raises:
        ConfigError: more ranks than GPUs, or no such shape.
        CommunicationError: a rank failed, or a path didn't give the sum.
    """
    if model not in SHAPES:
        raise ConfigError(f"no shape is called {model!r}; there are {', '.join(SHAPES)}")
    record = new_record("comm", quick)
    device = _device(world, record)
    rows, facts = run_ranks(world, device, measure_rank, device, quick)[0]
    bandwidth = memory_bandwidth(device, quick)
    if device == "cpu":  # processes share its memory
        ceilings, weights_us = {"cpu_gbps": bandwidth / 1e9}, layer_bytes(model, 4) / bandwidth * 1e6
    else:
        ceilings, weights_us = {"hbm_gbps": bandwidth / 1e9}, layer_bytes(model, 2) / world / bandwidth * 1e6
    summary = {"world": world, "device": device, **facts, **share(rows, model, weights_us)}
    return replace(record, rows=rows, ceilings=ceilings, summary=summary)


def _device(world: int, record: Record) -> str:
    """Where the ranks run; what can't be measured there is noted in `record`."""
    hardware = detect()
    if hardware.cuda is None:
        if world == 1:
            raise ConfigError("one rank on a CPU has no other to talk to; try --tp 2")
        why = f"{hardware.no_cuda_reason}; what is measured is gloo between processes on the CPU"
        record.skip("NCCL and its paths", why)
        return "cpu"
    if world > torch.cuda.device_count():
        raise ConfigError(f"{world} ranks need {world} GPUs; torch sees {torch.cuda.device_count()}")
    if world == 1:
        why = "one GPU: nothing crosses a link, and where NCCL has nothing to do either, an empty graph is timed"
        record.skip("links", why)
    return "cuda"


def layer_bytes(model: str, itemsize: int) -> float:
    """Bytes of one layer's matrices that one token is multiplied with."""
    with shape_folder(model) as folder:
        config = read_config(folder)
    return body_parameters(config) * itemsize / config.num_layers


# -- the ranks -----------------------------------------------------------------------------------------------------


def measure_rank(group: TPGroup, device: str, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """What one rank does: check, then time; the rows and the facts beside them."""
    sizes, samples = (QUICK_SIZES, 5) if quick else (SIZES, 15)
    if group.backend is None or not hasattr(group.backend, "reduce"):
        return measure_torch(group, torch.device(device), sizes, samples), {}
    comm: Any = group.backend  # NcclCommunicator, which can't be named without nccl4py
    check_paths(group, comm.reduce, comm.device)
    return list(_cuda_rows(comm, sizes, samples)), _cuda_facts(comm)


def check_paths(group: TPGroup, reduce: AllReduce, device: torch.device) -> None:
    """Every path once against the sum, into a poisoned buffer.

    Raises:
        CommunicationError: a path gave something else.
    """
    for path, run in reduce.paths.items():
        x = torch.full((1 << 12,), float("nan"), dtype=torch.bfloat16, device=device)
        x = view_of(reduce.places[path], (1 << 12,), torch.bfloat16) if path in reduce.places else x
        x.copy_(torch.arange(1 << 12, device=device) % 16 + group.rank)
        run(x)
        ranks = sum(range(group.size))
        expected = (torch.arange(1 << 12, device=device) % 16 * group.size + ranks).to(torch.bfloat16)
        if not torch.equal(x, expected):
            raise CommunicationError(
                f"all-reduce by {path} is wrong on rank {group.rank} of {group.size}; don't use it"
            )


def measure_torch(group: TPGroup, device: torch.device, sizes: Sequence[int], samples: int) -> list[Row]:
    """All-reduce and all-gather of torch's process group: gloo between CPUs, or NCCL where nccl4py is missing."""
    rows, path = [], "gloo" if device.type == "cpu" else "torch"
    for size in sizes:
        x, part = (torch.zeros(size // 4 // n, device=device) for n in (1, group.size))
        for op, call in (("all_reduce", partial(group.all_reduce, x)), ("all_gather", partial(group.all_gather, part))):
            group.all_reduce(torch.zeros(1))
            times = clock_us(call, samples) if path == "gloo" else graph_us(call, size, samples)
            rows.append(row(op, path, size, group.size, times))
    return rows


def clock_us(call: Callable[[], object], samples: int) -> list[float]:
    times = []
    for _ in range(samples + 2):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return times[2:]


def _cuda_rows(comm: Any, sizes: Sequence[int], samples: int) -> Iterator[Row]:
    """Every operation, path and size; at each size the paths one right after the other."""
    scratch = torch.zeros(2 * sizes[-1], dtype=torch.uint8, device=comm.device)
    for size in sizes:
        for path, run in comm.reduce.paths.items():
            if size <= comm.reduce.limit(path):
                x = view_of(comm.reduce.places.get(path, scratch), (size // 2,), torch.bfloat16)
                x.zero_()
                yield row("all_reduce", path, size, comm.size, graph_us(partial(run, x), size, samples))
        for path, place in (("direct", scratch), ("registered", comm.reduce.places.get("registered"))):
            if place is not None and size <= place.nbytes:
                out, part = gather_views(place, size, comm.rank, comm.size)
                us = graph_us(partial(comm.all_gather_into, out, part), size, samples)
                yield row("all_gather", path, size, comm.size, us)
        for path, place in comm.reduce.places.items():
            if size <= place.nbytes:
                us = graph_us(partial(place[:size].copy_, scratch[:size]), size, samples)
                yield row("copy", path, size, comm.size, us)


def gather_views(place: Tensor, size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """`size` bytes of `place` as the result [world, …] of an all-gather, and this rank's part, in its row already."""
    out = view_of(place, (world, size // 2 // world), torch.bfloat16)
    return out, out[rank]


def graph_us(call: Callable[[], object], size: int, samples: int) -> list[float]:
    """Microseconds a call in each of `samples` replays of a graph."""
    call()
    calls = 4 if size >= 4 << 20 else 32
    graph = capture(call, calls)
    return [replay_us(graph) / calls for _ in range(samples + 2)][2:]


def _cuda_facts(comm: Any) -> dict[str, Any]:
    """Times of the start, the host's time a call, and the paths that are chosen; the cached table is renewed."""
    began = time.perf_counter()
    table = PathTable(comm.machine, measure(comm.reduce, comm.device))
    probe_s = time.perf_counter() - began
    if comm.rank == 0:
        keep_table(table)
    x = torch.zeros(4096, dtype=torch.bfloat16, device=comm.device)
    host = clock_us(lambda: comm.reduce.paths["direct"](x), 100)
    torch.cuda.synchronize()
    in_place = [*ANYWHERE, *comm.reduce.places]
    return {
        "machine": {"gpus": list(comm.machine.gpus), "driver": comm.machine.driver, "nccl": comm.machine.nccl},
        "start_ms": {part: 1e3 * seconds for part, seconds in comm.start_s.items()},
        "probe_ms": 1e3 * probe_s,
        "host_us": statistics.median(host),
        "chosen": [list(pair) for pair in ranges(table, ANYWHERE)],
        "chosen_workspace": [list(pair) for pair in ranges(table, in_place)],
    }


# -- arithmetic ----------------------------------------------------------------------------------------------------


def row(op: str, path: str, num_bytes: int, world: int, times: Sequence[float]) -> Row:
    """A row of the record: microseconds, and the two bandwidths in GB/s."""
    us = spread(times)
    algo = gbps(num_bytes, us["median"])
    bus = algo * bus_factor(op, world)
    return {"op": op, "path": path, "bytes": num_bytes, "world": world, "us": us, "algo_gbps": algo, "bus_gbps": bus}


def bus_factor(op: str, world: int) -> float:
    """What a rank's link carries, of the bytes of the result. A copy reads and writes its bytes, over no link."""
    return {"all_reduce": 2 * (world - 1) / world, "all_gather": (world - 1) / world, "copy": 2.0}[op]


def crossovers(rows: Sequence[Row], op: str, paths: Sequence[str] | None = None) -> list[tuple[int, str]]:
    """The fastest path by size, as (largest bytes, path): where it changes, paths cross over."""
    table = as_table(rows, op)
    return list(ranges(table, [path for path in table.us if paths is None or path in paths]))


def as_table(rows: Sequence[Row], op: str) -> PathTable:
    """The medians of `op`, to read times off between the measured sizes."""
    us: dict[str, dict[int, float]] = {}
    for found in rows:
        if found["op"] == op:
            us.setdefault(found["path"], {})[found["bytes"]] = found["us"]["median"]
    return PathTable(Machine((), "", "", ""), us)


def share(rows: Sequence[Row], model: str, weights_us: float) -> dict[str, Any]:
    """What all-reduces add to a decode step of `model`: two a layer, of a hidden state for each sequence.

    On a GPU in bf16, on a CPU (gloo) in float32. Their time is that of the fastest path at that size. `share` is of a
    layer that does nothing but communicate and read its weights, which take `weights_us`: the most that it can be.
    """
    shape, table = SHAPES[model], as_table(rows, "all_reduce")
    itemsize, layers = 4 if set(table.us) == {"gloo"} else 2, shape["num_hidden_layers"]
    batches = []
    for batch in BATCHES:
        num_bytes = batch * shape["hidden_size"] * itemsize
        path = table.choose(num_bytes, list(table.us))
        layer = 2 * table.estimate(path, num_bytes)
        times = {"layer_us": layer, "token_us": layer * layers, "share": layer / (layer + weights_us)}
        batches.append({"batch": batch, "bytes": num_bytes, "path": path, **times})
    at = next(step for step in batches if step["batch"] == BATCH)
    whole = {name: at[name] for name in ("batch", "layer_us", "token_us", "share")}
    return {"model": model, "layers": layers, "weights_us": weights_us, "batches": batches, **whole}
