"""What the ranks of `test_comm.py` do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minisgl.distributed import TPGroup
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
    src = group.size - 1
    assert torch.equal(group.broadcast(inputs[group.rank].clone(), src), inputs[src])
    assert torch.equal(group.broadcast(inputs[group.rank].clone()), inputs[0])
    group.barrier()


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
    group.barrier()
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
    heads = [g.broadcast(torch.tensor([group.rank])).item() for g in (group, other, group)]
    other.close()
    group.barrier()
    return heads


def odd_columns(group: TPGroup) -> None:
    with pytest.raises(ConfigError, match=r"7 columns can't be split over 2 ranks"):
        group.reduce_scatter(torch.ones(2, 7))
