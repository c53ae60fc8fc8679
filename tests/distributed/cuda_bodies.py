"""What the ranks of `test_comm_cuda.py` do. Inputs are small whole numbers, so every sum is exact in every dtype."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.distributed.allreduce import AllReduce, view_of
from minisgl.distributed.group import communicator
from minisgl.distributed.paths import PathTable

BF16 = torch.bfloat16
BYTES = (16, 48, 1 << 10, (1 << 12) + 16, 1 << 15, (1 << 18) + 48, 1 << 20, (1 << 22) + 16, 1 << 24)
ODD_BYTES = (2, 6, 34, 4098, (1 << 20) + 2)


def device_of(group: TPGroup) -> torch.device:
    return torch.device("cuda", group.rank)


def value(rank: int, count: int, dtype: torch.dtype, device: torch.device, turn: int = 0) -> Tensor:
    """What `rank` puts in at `turn`: whole numbers from 0 to 15 that differ by rank, place and turn."""
    return ((torch.arange(count, device=device) * (rank + 3) + 5 * turn + rank) % 16).to(dtype)


def total(size: int, count: int, dtype: torch.dtype, device: torch.device, turn: int = 0) -> Tensor:
    return torch.stack([value(r, count, torch.int64, device, turn) for r in range(size)]).sum(0).to(dtype)


def cases(reduce: AllReduce) -> Iterator[tuple[str, Any, int, torch.dtype]]:
    """Every path with every size and dtype that it takes."""
    for path, run in reduce.paths.items():
        dtypes, sizes = (torch.float32, BF16, torch.float16), (*BYTES, *ODD_BYTES)
        if "shot" in path:
            dtypes, sizes = (torch.float32, BF16), BYTES
        for dtype, num_bytes in itertools.product(dtypes, sizes):
            if num_bytes % dtype.itemsize == 0 and num_bytes <= reduce.limit(path):
                yield path, run, num_bytes // dtype.itemsize, dtype


def place_for(reduce: AllReduce, path: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A poisoned tensor where the path takes it."""
    if path in reduce.places:
        return view_of(reduce.places[path], (count,), dtype).fill_(float("nan"))
    return torch.full((count,), float("nan"), dtype=dtype, device=device)


def reduce_of(group: TPGroup) -> AllReduce:
    backend: Any = group.backend
    assert isinstance(backend.reduce, AllReduce)
    return backend.reduce


def every_path(group: TPGroup, wanted: list[str]) -> int:
    """Each path at each size against the sum; returns how many cases there were."""
    device, reduce, count = device_of(group), reduce_of(group), 0
    missing = set(wanted) - set(reduce.paths)
    assert not missing, f"paths that this machine should have and has not: {missing}"
    for path, run, n, dtype in cases(reduce):
        x = place_for(reduce, path, n, dtype, device)
        x.copy_(value(group.rank, n, dtype, device))
        run(x)
        assert torch.equal(x, total(group.size, n, dtype, device)), (path, n, dtype)
        count += 1
    return count


def neighbours_untouched(group: TPGroup) -> None:
    """What lies beside the tensor keeps its poison, in ordinary memory and in the workspaces."""
    device, reduce = device_of(group), reduce_of(group)
    for path, run in reduce.paths.items():
        place = reduce.places.get(path)
        whole = torch.empty(4096, dtype=BF16, device=device) if place is None else view_of(place, (4096,), BF16)
        whole.fill_(-7)
        run(whole[:1000])
        assert bool((whole[1000:] == -7).all()), path


def collectives(group: TPGroup) -> None:
    """What `TPGroup` promises, on GPU tensors and on CPU tensors of the same group."""
    for device in (device_of(group), torch.device("cpu")):
        for dtype in (torch.float32, BF16, torch.float16, torch.int32, torch.int64, torch.uint8):
            for rows, width in ((1, 8), (3, 4 * group.size), (7, 128 * group.size), (0, 8)):
                inputs = [value(r, rows * width, dtype, device).view(rows, width) for r in range(group.size)]
                mine, added = (
                    inputs[group.rank].clone(),
                    total(group.size, rows * width, dtype, device).view(rows, width),
                )
                assert torch.equal(group.all_gather(mine), torch.cat(inputs, -1)), (device, dtype)
                if width % group.size == 0:
                    assert torch.equal(group.reduce_scatter(mine), added.chunk(group.size, -1)[group.rank])
                assert torch.equal(group.all_reduce(mine), added)


def workspaces(group: TPGroup) -> list[str]:
    """Projections that write into the workspace, when a table makes each kind the fastest; the ways they went."""
    device, reduce, ways = device_of(group), reduce_of(group), []
    backend: Any = group.backend
    chosen = reduce.table
    assert chosen is not None
    for best in reduce.places:
        sizes = (1 << 4, 1 << 20)
        reduce.table = PathTable(
            backend.machine, {"direct": dict.fromkeys(sizes, 9.0), best: dict.fromkeys(sizes, 1.0)}
        )
        weight = torch.eye(64, dtype=BF16, device=device)
        x = value(group.rank, 5 * 64, BF16, device).view(5, 64)
        out = group.workspace((5, 64), BF16)
        assert out is not None
        out.fill_(float("nan"))
        torch.mm(x, weight, out=out)
        ways.append(reduce.path_of(out))
        assert group.all_reduce(out) is out
        assert torch.equal(out, total(group.size, 5 * 64, BF16, device).view(5, 64))
    reduce.table = chosen
    return ways


def graph_replays(group: TPGroup, replays: int) -> int:
    """Chains of all-reduces in one CUDA graph, replayed with inputs that change and outputs that are poisoned between.

    Several sizes and all paths follow one another in the graph, as layers do: a call that ends before every rank has
    read would be overwritten by the next.
    """
    device, reduce = device_of(group), reduce_of(group)
    chain = [(path, n) for n in (512, 8 << 10, 96 << 10) for path in reduce.paths if n * 2 <= reduce.limit(path)]
    inputs = [torch.zeros(n, dtype=BF16, device=device) for _, n in chain]
    outputs = [torch.zeros(n, dtype=BF16, device=device) for _, n in chain]
    scratch = [place_for(reduce, path, n, BF16, device) for path, n in chain]

    def step() -> None:
        for (path, _), source, x, out in zip(chain, inputs, scratch, outputs, strict=True):
            x.copy_(source)
            reduce.paths[path](x)
            out.copy_(x)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(replays):
        for x, out in zip(inputs, outputs, strict=True):
            x.copy_(value(group.rank, len(x), BF16, device, turn))
            out.fill_(float("nan"))
        graph.replay()
        for out in outputs:
            wrong += (out != total(group.size, len(out), BF16, device, turn)).sum()
    assert int(wrong) == 0, f"{int(wrong)} elements of {replays} replays are wrong"
    return len(chain)


def eager_between_replays(group: TPGroup) -> None:
    """Calls outside a graph between replays of one, which share the workspaces."""
    device, reduce = device_of(group), reduce_of(group)
    for path, run in reduce.paths.items():
        x = place_for(reduce, path, 4096, BF16, device)
        source, out = torch.zeros_like(x), torch.zeros_like(x)
        run(x)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            x.copy_(source)
            run(x)
            out.copy_(x)
        for turn in range(20):
            source.copy_(value(group.rank, 4096, BF16, device, turn))
            graph.replay()
            assert torch.equal(out, total(group.size, 4096, BF16, device, turn)), (path, turn)
            x.copy_(value(group.rank, 4096, BF16, device, turn + 1))
            run(x)
            assert torch.equal(x, total(group.size, 4096, BF16, device, turn + 1)), (path, turn)


def skewed(group: TPGroup) -> None:
    """Ranks that come at different times wait for one another: a long kernel on one of them before each call."""
    device, reduce = device_of(group), reduce_of(group)
    for path, run in reduce.paths.items():
        for turn in range(3 * group.size):
            x = place_for(reduce, path, 8192, BF16, device)
            x.copy_(value(group.rank, 8192, BF16, device, turn))
            if turn % group.size == group.rank:
                torch.cuda._sleep(2_000_000)
            run(x)
            assert torch.equal(x, total(group.size, 8192, BF16, device, turn)), (path, turn)


def same_bits(group: TPGroup) -> dict[str, list[int]]:
    """By path, a sum over the bits of rough numbers' sums: ranks that differ in one bit differ here."""
    device, reduce, found = device_of(group), reduce_of(group), {}
    for path, run in reduce.paths.items():
        found[path] = []
        for count in (64, 8192, 262_144):
            x = place_for(reduce, path, count, BF16, device)
            generator = torch.Generator(device).manual_seed(group.rank)
            x.copy_(torch.randn(count, device=device, generator=generator))
            run(x)
            weights = torch.arange(1, count + 1, device=device)
            found[path].append(int((x.view(torch.int16).long() * weights).sum()))
    return found


def table_is_agreed(group: TPGroup) -> tuple[bytes, list[str], dict[str, float]]:
    """The table, the paths that sizes take by it, and the seconds of the start's parts."""
    backend: Any = group.backend
    reduce = reduce_of(group)
    assert reduce.table is not None
    ways = [
        reduce.path_of(torch.empty(1 << k, dtype=torch.uint8, device=device_of(group)).view(BF16)) for k in range(4, 27)
    ]
    return reduce.table.to_json(), ways, backend.start_s


def after_close(group: TPGroup) -> str:
    """A closed group refuses; a second one in the same process works, next to a first that is still open."""
    import tempfile

    from minisgl.types import CommunicationError

    group.all_reduce(torch.zeros(1))
    if group.size == 1:
        with tempfile.TemporaryDirectory() as folder:
            second = TPGroup(0, 1, communicator(0, 1, device_of(group), Path(folder), 60.0))
            x = torch.ones(8, device=device_of(group))
            assert torch.equal(second.all_reduce(x), torch.ones_like(x))
            second.close()
    group.close()
    group.close()
    try:
        group.all_reduce(torch.ones(8, device=device_of(group)))
    except CommunicationError as e:
        return str(e)
    return "no error"


def second_group(group: TPGroup, folder: str) -> list[str]:
    """A group of ranks of which the first has been in one more group before; its paths, once each gave the sum."""
    device = device_of(group)
    if group.rank == 0:
        (alone := Path(folder) / "alone").mkdir()
        communicator(0, 1, device, alone, 60.0).close()
        (Path(folder) / "all").mkdir()
    group.all_reduce(torch.zeros(1))
    second = TPGroup(group.rank, group.size, communicator(group.rank, group.size, device, Path(folder) / "all", 60.0))
    paths = reduce_of(second).paths
    for path, run in paths.items():
        x = place_for(reduce_of(second), path, 4096, BF16, device)
        run(x.copy_(value(group.rank, 4096, BF16, device)))
        assert torch.equal(x, total(group.size, 4096, BF16, device)), path
    second.close()
    return list(paths)


def multicast_is_off(group: TPGroup) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST")}


_kept: list[torch.cuda.CUDAGraph] = []


def close_under_a_graph(group: TPGroup) -> float:
    """Closes while a graph holds one of NCCL's calls, for which NCCL itself waits; the seconds that it took."""
    x = torch.ones(1024, device=device_of(group))
    group.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reduce_of(group).paths["direct"](x)
    _kept.append(graph)
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    group.close()
    return time.perf_counter() - began
