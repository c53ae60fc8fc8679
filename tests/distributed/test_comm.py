"""The communicator's interface, on real gloo processes of one machine."""

from __future__ import annotations

from pathlib import Path

import comm_bodies as bodies
import pytest
import torch
from worlds import run_world

from minisgl.distributed import TPGroup
from minisgl.types import CommunicationError, ConfigError

SHAPES = [(1,), (8,), (3, 4), (2, 1, 8), (5, 12), (0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives_give_the_sum_and_the_parts_of_all_ranks(size: int) -> None:
    run_world(size, bodies.all_shapes, SHAPES, DTYPES)


def test_all_reduce_sums_a_strided_view_in_place() -> None:
    run_world(2, bodies.strided_all_reduce)


def test_all_reduce_leaves_the_same_bits_on_every_rank() -> None:
    first, *others = run_world(4, bodies.same_bits)
    assert all(other == first for other in others)


def test_workspace_is_none_on_a_cpu() -> None:
    assert run_world(2, bodies.no_workspace) == [True, True]
    assert TPGroup().workspace((2, 8), torch.float32) is None


def test_closed_group_refuses_collectives() -> None:
    for rank, error in enumerate(run_world(2, bodies.after_close)):
        assert f"all_reduce failed on rank {rank} of 2" in error
        assert "the group is closed" in error


def test_survivors_of_a_dead_rank_get_a_typed_error() -> None:
    errors = run_world(3, bodies.last_rank_dies, mortal=frozenset({2}))
    assert errors[2] is None
    assert all("another rank has ended" in error for error in errors[:2])


def test_groups_of_one_process_do_not_collide(tmp_path: Path) -> None:
    assert run_world(2, bodies.two_groups, str(tmp_path)) == [[0, 1, 0], [0, 1, 0]]


def test_group_of_one_needs_no_others(tmp_path: Path) -> None:
    group = TPGroup.connect(0, 1, torch.device("cpu"), tmp_path / "missing")
    x = torch.arange(6.0).view(2, 3)
    for result in (group.all_reduce(x), group.all_gather(x), group.reduce_scatter(x)):
        assert result is x
    group.close()


def test_connect_refuses_what_cannot_work(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="rank 2 of a group of 2 ranks; expected a rank from 0 to 1"):
        TPGroup.connect(2, 2, cpu, tmp_path)
    with pytest.raises(ConfigError, match="is no folder; create it"):
        TPGroup.connect(0, 2, cpu, tmp_path / "missing")
    with pytest.raises(CommunicationError, match="connect failed on rank 0 of 2"):
        TPGroup.connect(0, 2, cpu, tmp_path, timeout_s=0.5)


def test_reduce_scatter_refuses_columns_that_do_not_divide() -> None:
    run_world(2, bodies.odd_columns)
