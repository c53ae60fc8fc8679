"""The NCCL communicator on GPUs: a group of one goes the whole way, groups of several give the sum on every path.

Under compute-sanitizer: `compute-sanitizer --target-processes all python -m pytest -m cuda -k one_gpu <this file>`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import cuda_bodies as bodies
import pytest
import torch
from worlds import run_world

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(importlib.util.find_spec("nccl") is None, reason="nccl4py isn't installed (extra 'cuda')"),
]
GPUS = torch.cuda.device_count()


def needs(n: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(n > GPUS, reason=f"needs {n} GPUs, this machine has {GPUS}")


WORLDS = [pytest.param(n, marks=needs(n), id=f"{n}_gpus") for n in (2, 4, 8)]
ALL = [pytest.param(1, id="one_gpu"), *WORLDS]
NCCL_PATHS = ["direct", "registered", "registered_copy"]
SHOT_PATHS = ["one_shot", "two_shot", "two_shot_copy"]


def wanted(size: int) -> list[str]:
    """What a machine with NVLink has; whether torch maps the memory of one GPU to itself is left to torch."""
    return [*NCCL_PATHS, *SHOT_PATHS] if size > 1 else NCCL_PATHS


@pytest.mark.parametrize("size", ALL)
def test_every_path_gives_the_sum(size: int) -> None:
    """NCCL from 2.27 on registers windows; symmetric memory needs GPUs that reach one another, as NVLink's do."""
    counts = run_world(size, bodies.every_path, wanted(size), device="cuda")
    assert min(counts) > 60


@pytest.mark.parametrize("size", ALL)
def test_paths_write_nothing_beside_the_tensor(size: int) -> None:
    run_world(size, bodies.neighbours_untouched, device="cuda")


@pytest.mark.parametrize("size", ALL)
def test_collectives_of_the_group(size: int) -> None:
    run_world(size, bodies.collectives, device="cuda")


@pytest.mark.parametrize("size", ALL)
def test_workspaces_are_summed_in_place(size: int) -> None:
    for ways in run_world(size, bodies.workspaces, device="cuda"):
        assert ways[:size] == ["registered", "two_shot"][:size]


@pytest.mark.parametrize("size", ALL)
def test_replays_of_a_graph_give_the_sum_of_what_is_there(size: int) -> None:
    replays = 200 if size == 1 else 2000
    assert min(run_world(size, bodies.graph_replays, replays, device="cuda")) >= 9


@pytest.mark.parametrize("size", ALL)
def test_eager_calls_between_replays(size: int) -> None:
    run_world(size, bodies.eager_between_replays, device="cuda")


@pytest.mark.parametrize("size", WORLDS)
def test_ranks_that_come_late_are_waited_for(size: int) -> None:
    run_world(size, bodies.skewed, device="cuda")


@pytest.mark.parametrize("size", WORLDS)
def test_ranks_hold_the_same_bits(size: int) -> None:
    first, *others = run_world(size, bodies.same_bits, device="cuda")
    assert all(other == first for other in others)


@pytest.mark.parametrize("size", ALL)
def test_start_measures_once_and_agrees(size: int, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path))
    first = run_world(size, bodies.table_is_agreed, device="cuda")
    assert len({(text, *ways) for text, ways, _ in first}) == 1
    times = json.loads(first[0][0])["us"]
    assert set(times) >= set(wanted(size))
    again = run_world(size, bodies.table_is_agreed, device="cuda")
    assert again[0][0] == first[0][0]  # read back, not measured anew
    print(f"seconds of the start: {first[0][2]}, then {again[0][2]}")


@pytest.mark.parametrize("size", ALL)
def test_closed_group_refuses(size: int) -> None:
    for error in run_world(size, bodies.after_close, device="cuda"):
        assert "all_reduce failed" in error


@pytest.mark.parametrize("size", ALL)
def test_closing_does_not_wait_for_graphs(size: int) -> None:
    print(f"seconds that closing took: {run_world(size, bodies.close_under_a_graph, device='cuda')}")


@pytest.mark.parametrize("size", ALL)
def test_process_that_was_in_a_group_before_joins_another(size: int, tmp_path: Path) -> None:
    for paths in run_world(size, bodies.second_group, str(tmp_path), device="cuda"):
        assert set(paths) >= set(wanted(size))


def test_one_gpu_leaves_multicast_alone() -> None:
    assert run_world(1, bodies.multicast_is_off, device="cuda") == [
        {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    ]
