"""What the ranks of `test_comm.py` do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.distributed.allreduce import AllReduce
from minisgl.distributed.paths import Machine, PathTable
from minisgl.distributed.probe import agreed_table
from minisgl.distributed.torch_comm import TorchCommunicator, broadcast_bytes, gather_bytes
from minisgl.types import CommunicationError, ConfigError


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small whole numbers, so that every dtype here adds them up exactly."""
    return torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def collectives(group: TPGroup, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every collective against what it should give, computed from all ranks' inputs."""
    inputs = [of_rank(rank, shape, dtype) for rank in range(group.size)]
    mine, total = inputs[group.rank].clone(), torch.stack(inputs).sum(0).to(dtype)
    assert torch.equal(group.all_gather(mine), torch.cat(inputs, dim=-1))
    assert torch.equal(mine, inputs[group.rank])
    if shape[-1] % group.size == 0:
        expected = total.chunk(group.size, dim=-1)[group.rank]
        assert torch.equal(group.reduce_scatter(mine), expected)
    assert group.all_reduce(mine) is mine
    assert torch.equal(mine, total)


def all_shapes(group: TPGroup, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> None:
    for shape in shapes:
        for dtype in dtypes:
            collectives(group, shape, dtype)


def strided_all_reduce(group: TPGroup) -> None:
    """A transposed view is summed in place, and nothing beside it is touched."""
    base = torch.full((4, 6), -1.0)
    view = base[:, :3].T
    view.copy_(torch.full((3, 4), float(group.rank + 1)))
    group.all_reduce(view)
    assert torch.equal(view, torch.full((3, 4), sum(range(1, group.size + 1)) * 1.0))
    assert torch.equal(base[:, 3:], torch.full((4, 3), -1.0))


def same_bits(group: TPGroup) -> list[bytes]:
    """What every rank holds after all-reduces of rough numbers, as bytes."""
    found = []
    for size in (1, 7, 1000, 65537):
        x = torch.randn(size, generator=torch.Generator().manual_seed(group.rank))
        found.append(group.all_reduce(x).numpy().tobytes())
    return found


def no_workspace(group: TPGroup) -> bool:
    return group.workspace((2, 8), torch.float32) is None


def after_close(group: TPGroup) -> str:
    group.all_reduce(torch.zeros(1))
    group.close()
    group.close()
    try:
        group.all_reduce(torch.ones(3))
    except CommunicationError as e:
        return str(e)
    return "no error"


def last_rank_dies(group: TPGroup) -> str:
    """The last rank ends in the middle; what the others are told."""
    group.all_reduce(torch.ones(8))
    if group.rank == group.size - 1:
        os._exit(3)
    try:
        while True:
            group.all_reduce(torch.ones(8))
    except CommunicationError as e:
        return str(e)


def two_groups(group: TPGroup, folder: str) -> list[float]:
    """A second group of the same processes, with the ranks the other way round, beside the first."""
    rank = group.size - 1 - group.rank
    other = TPGroup.connect(rank, group.size, torch.device("cpu"), Path(folder))
    heads = [g.all_gather(torch.tensor([group.rank]))[0].item() for g in (group, other, group)]
    other.close()
    group.all_reduce(torch.zeros(1))
    return heads


def odd_columns(group: TPGroup) -> None:
    with pytest.raises(ConfigError, match=r"7 columns can't be split over 2 ranks"):
        group.reduce_scatter(torch.ones(2, 7))


def bytes_across(group: TPGroup) -> None:
    """Byte strings, empty ones too, from rank 0 and from all."""
    comm = group.backend
    assert isinstance(comm, TorchCommunicator)
    for text in (b"", b"x", bytes(range(256)) * 100):
        assert broadcast_bytes(comm, text if group.rank == 0 else b"") == text
        assert broadcast_bytes(comm, text if group.rank == 0 else text[::-1]) == text
        assert broadcast_bytes(comm, text if group.rank == 0 else b"of another length") == text
    assert gather_bytes(comm, b"r" * group.rank) == [b"r" * rank for rank in range(group.size)]


def agreement(group: TPGroup, cache: str, start: int) -> tuple[bytes, int]:
    """What start number `start` of ranks with a cache agrees on, and how often this rank measured.

    Ranks that measure find times that depend on rank and start, so a rank that goes its own way is seen.
    """
    os.environ["MINISGL_CACHE"] = cache if group.rank == 0 else os.devnull
    machine, measured = Machine(("gpu",) * group.size, "1", "2", "3"), []

    def measure() -> dict[str, dict[int, float]]:
        measured.append(1)
        return {"direct": {1024: 1.0 + group.rank + 10 * start}}

    assert isinstance(group.backend, TorchCommunicator)
    table = agreed_table(group.backend, group.rank, machine, measure)
    return table.to_json(), len(measured)


def reducer_with(group: TPGroup, us: dict[str, dict[int, float]]) -> tuple[AllReduce, list[str]]:
    """An `AllReduce` whose paths all sum over gloo, and the list of the paths that were taken."""
    assert group.backend is not None
    taken: list[str] = []

    def run(name: str, x: Tensor) -> None:
        taken.append(name)
        assert group.backend is not None
        group.backend.all_reduce(x)

    reduce = AllReduce(lambda x: run("direct", x))
    for name, num_bytes in (("registered", 1 << 16), ("two_shot", 1 << 12)):
        poison = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)  # NaN in every floating-point type
        reduce.add(name, lambda x, name=name: run(name, x), poison)
    reduce.paths["one_shot"] = lambda x: run("one_shot", x)
    reduce.table = PathTable(Machine(("gpu",) * group.size, "", "", ""), us)
    return reduce, taken


def every_path(group: TPGroup) -> None:
    """Each path, made the fastest in turn, gives the sum of tensors from anywhere and from its workspace."""
    sizes = [1 << k for k in range(4, 17, 2)]
    for best, runs in (
        ("direct", "direct"),
        ("one_shot", "one_shot"),
        ("two_shot_copy", "two_shot"),
        ("registered_copy", "registered"),
    ):
        names = ("direct", "registered", "registered_copy", "one_shot", "two_shot", "two_shot_copy")
        us = {name: dict.fromkeys(sizes, 10.0 - 5 * (name == best)) for name in names}
        reduce, taken = reducer_with(group, us)
        for count in (8, 64, 1000):
            x = of_rank(group.rank, (2, count), torch.float32)
            reduce(x)
            assert torch.equal(x, sum(of_rank(rank, (2, count), torch.float32) for rank in range(group.size)))
        fits = [best == "direct" or n <= reduce.limit(best) for n in (64, 512, 8000)]
        assert taken == [runs if fit else "direct" for fit in fits]
        if runs in reduce.places:
            us[runs] = dict.fromkeys(sizes, 1.0)
            reduce, taken = reducer_with(group, us)
            space = reduce.workspace((4, 8), torch.float32)
            assert space is not None
            space.copy_(of_rank(group.rank, (4, 8), torch.float32))
            reduce(space)
            assert torch.equal(space, sum(of_rank(rank, (4, 8), torch.float32) for rank in range(group.size)))
            assert taken == [runs]


def environment(group: TPGroup, name: str) -> str | None:
    return os.environ.get(name)


def one_shot(group: TPGroup, folder: str) -> None:
    """Our kernel, run by Triton's interpreter: each rank writes to slots that all map, as GPUs map one another's."""
    import interpreter  # noqa: F401  # before the kernel

    from minisgl.distributed.triton_one_shot import MOST_ONE_SHOT, NUM_SLOTS, OneShot

    count = group.size * NUM_SLOTS
    slots = [torch.from_file(f"{folder}/{r}", True, count, dtype=torch.int64) for r in range(group.size)]
    run = OneShot([s.data_ptr() for s in slots], group.rank, torch.device("cpu"))
    group.all_reduce(torch.zeros(1))
    for turn in range(3):
        for numbers, dtype in ((8, torch.bfloat16), (5000, torch.bfloat16), (4, torch.float32), (3000, torch.float32)):
            inputs = [of_rank(rank + turn, (numbers,), dtype) for rank in range(group.size)]
            whole = torch.full((numbers + 64,), -7.0, dtype=dtype)
            whole[:numbers] = inputs[group.rank]
            run(whole[:numbers])
            assert torch.equal(whole[:numbers], torch.stack(inputs).sum(0).to(dtype)), (turn, numbers, dtype)
            assert bool((whole[numbers:] == -7).all())
    rough = torch.randn(4096, generator=torch.Generator().manual_seed(group.rank)).bfloat16()
    every = group.all_gather(rough.float()[None]).view(group.size, -1)
    run(rough)
    assert torch.allclose(rough.float(), every.sum(0), rtol=2**-7, atol=1e-6)  # the interpreter cuts off, GPUs round
    assert bool((group.all_gather(rough.float()[None]).view(group.size, -1) == rough.float()).all())
    group.all_reduce(torch.zeros(1))
    run.stop.fill_(1)
    if group.rank == 0:  # the others don't come
        run(torch.zeros(MOST_ONE_SHOT // 64))
    group.all_reduce(torch.zeros(1))
