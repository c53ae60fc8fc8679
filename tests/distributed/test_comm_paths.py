"""Which way an all-reduce goes: the table of times, the choice, and that all ranks make the same one.

`PUBLISHED` are figures that others report for H100s (a custom all-reduce on 8 GPUs, and plain NCCL beside it); all
other times here are made up. None of them was measured by this project.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import comm_bodies as bodies
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore, PrefixStore, _resolve_process_group
from worlds import run_world

from minisgl.distributed.allreduce import AllReduce, view_of
from minisgl.distributed.paths import (
    ANYWHERE,
    NEEDS,
    Machine,
    PathTable,
    keep_table,
    load_table,
    read_table,
    table_file,
)
from minisgl.distributed.symmetric import register
from minisgl.distributed.torch_comm import CommonKeys, gloo_group, meet
from minisgl.profiling.comm_tables import cached_tables, ranges

KIB = 1 << 10
MACHINE = Machine(("NVIDIA H100", "NVIDIA H100"), "580.1", "2.28.9", "2.11.0")
PUBLISHED = PathTable(
    Machine(("NVIDIA H100 80GB HBM3",) * 8, "", "", ""),
    {
        "one_shot": {4 * KIB: 5.7, 32 * KIB: 7.8, 256 * KIB: 16.7, 1024 * KIB: 33.8},
        "direct": {4 * KIB: 19.0, 512 * KIB: 25.0, 8192 * KIB: 70.0},  # the last one is made up
    },
)


def table(**us: dict[int, float]) -> PathTable:
    return PathTable(MACHINE, us)


def test_choice_follows_the_published_crossover() -> None:
    """One-shot up to where its line crosses NCCL's, which lies between 256 KiB and 1 MiB."""
    paths = ["direct", "one_shot"]
    for size in (1, 4 * KIB, 5000, 32 * KIB, 256 * KIB):
        assert PUBLISHED.choose(size, paths) == "one_shot"
    for size in (1024 * KIB, 1024 * KIB + 16, 8192 * KIB, 1 << 30):
        assert PUBLISHED.choose(size, paths) == "direct"
    crossing = [n for n in range(256 * KIB, 1024 * KIB, KIB) if PUBLISHED.choose(n, paths) == "direct"]
    assert crossing
    assert crossing == list(range(crossing[0], 1024 * KIB, KIB))  # one crossing, no going back and forth
    assert list(ranges(PUBLISHED, paths)) == [(512 * KIB, "one_shot"), (8192 * KIB, "direct")]


def test_estimate_joins_measured_sizes_in_log_log_scale() -> None:
    times = table(direct={1 * KIB: 4.0, 4 * KIB: 16.0})
    assert times.estimate("direct", 1) == 4.0  # below the smallest: latency
    assert times.estimate("direct", 1 * KIB) == 4.0
    assert times.estimate("direct", 2 * KIB) == pytest.approx(8.0)
    assert times.estimate("direct", 4 * KIB + 1) == math.inf
    assert times.estimate("one_shot", 1) == math.inf


def test_choice_without_times_is_direct() -> None:
    assert table().choose(4096, ["direct", "registered_copy"]) == "direct"
    assert table(one_shot={KIB: 1.0}).choose(4096, ["direct", "one_shot"]) == "direct"
    assert table(direct={KIB: 2.0}).choose(4096, []) == "direct"


_times = st.dictionaries(st.sampled_from([KIB << k for k in range(8)]), st.floats(0.1, 1e5), min_size=1)
_tables = st.dictionaries(st.sampled_from([*ANYWHERE, *NEEDS]), _times).map(lambda us: PathTable(MACHINE, us))


@given(_tables, st.integers(1, 1 << 20))
def test_choice_is_the_least_estimate_and_survives_the_disk(times: PathTable, num_bytes: int) -> None:
    chosen = times.choose(num_bytes, ANYWHERE)
    best = min(times.estimate(path, num_bytes) for path in ANYWHERE)
    assert times.estimate(chosen, num_bytes) == best or (chosen == "direct" and best == math.inf)
    again = PathTable.from_json(times.to_json())
    assert again.machine == times.machine
    assert again.choose(num_bytes, ANYWHERE) == chosen


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"machine": {}, "us": {}}', '{"machine": 1, "us": 2}']
    + [
        PathTable(MACHINE, {"direct": {KIB: 1.5}}).to_json().decode().replace("1.5", bad)
        for bad in ("0", "-1", "NaN", '"x"')
    ],
)
def test_what_is_no_table_counts_as_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(text, encoding="utf-8")
    assert read_table(file) is None


def test_tables_are_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path))
    assert load_table(MACHINE) is None
    assert cached_tables() == []
    keep_table(PUBLISHED)
    keep_table(table(direct={KIB: 3.0}))
    assert load_table(MACHINE) == table(direct={KIB: 3.0})
    assert load_table(Machine(MACHINE.gpus, "581.0", MACHINE.nccl, MACHINE.torch)) is None
    assert [len(found.machine.gpus) for found in cached_tables()] == [2, 8]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"] == []


def test_damaged_table_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path))
    keep_table(PUBLISHED)
    table_file(PUBLISHED.machine).write_text("{", encoding="utf-8")
    assert load_table(PUBLISHED.machine) is None
    assert cached_tables() == []


def reducer(us: dict[str, dict[int, float]]) -> AllReduce:
    """All paths, none of which does anything; workspaces of 64 KiB and 4 KiB."""
    reduce = AllReduce(lambda x: None)
    reduce.add("registered", lambda x: None, torch.zeros(1 << 16, dtype=torch.uint8))
    reduce.add("two_shot", lambda x: None, torch.zeros(1 << 12, dtype=torch.uint8))
    reduce.paths["one_shot"] = lambda x: None
    reduce.table = PathTable(MACHINE, us)
    return reduce


FAST_SHOTS = {"direct": {KIB: 9.0}, "one_shot": {KIB: 1.0}, "two_shot_copy": {KIB: 2.0}, "registered_copy": {KIB: 3.0}}


def test_paths_that_cannot_take_a_tensor_are_left_out() -> None:
    reduce = reducer(FAST_SHOTS)
    assert reduce.path_of(torch.zeros(8)) == "one_shot"
    assert reduce.path_of(torch.zeros(7)) == "registered_copy"  # 28 bytes
    assert reduce.path_of(torch.zeros(9)[1:]) == "registered_copy"  # begins 4 bytes into its storage
    assert reduce.path_of(torch.zeros(8, dtype=torch.float16)) == "registered_copy"
    assert reduce.path_of(torch.zeros(2, dtype=torch.int64)) == "registered_copy"
    slow = {path: {1 << 21: times[KIB]} for path, times in FAST_SHOTS.items()}
    reduce = reducer(slow)
    assert reduce.path_of(torch.zeros(1 << 18)) == "one_shot"
    assert reduce.path_of(torch.zeros((1 << 18) + 4)) == "direct"
    del slow["one_shot"]
    reduce = reducer(slow)
    assert reduce.path_of(torch.zeros(1 << 10)) == "two_shot_copy"  # 4 KiB: fits the smaller workspace
    assert reduce.path_of(torch.zeros((1 << 10) + 4)) == "registered_copy"
    assert reduce.path_of(torch.zeros((1 << 14) + 4)) == "direct"


def test_tensors_in_a_workspace_go_its_way() -> None:
    reduce = reducer(FAST_SHOTS)
    for path, place in reduce.places.items():
        assert reduce.path_of(view_of(place, (4, 4), torch.bfloat16)) == path
        assert reduce.path_of(place.view(torch.float32)[4:8]) == "direct"  # copying within the buffer would overlap


def test_workspace_is_given_where_writing_to_it_pays() -> None:
    us = FAST_SHOTS | {"registered": {KIB: 0.5}, "two_shot": {KIB: 4.0}}
    space = reducer(us).workspace((2, 8), torch.bfloat16)
    assert space is not None
    assert (space.shape, space.dtype) == ((2, 8), torch.bfloat16)
    reduce = reducer(us)
    first, second = reduce.workspace((2, 8), torch.bfloat16), reduce.workspace((2, 8), torch.bfloat16)
    assert first is second
    assert first is not None
    assert first.data_ptr() == reduce.places["registered"].data_ptr()
    assert reducer(FAST_SHOTS | {"registered": {KIB: 1.5}}).workspace((2, 8), torch.bfloat16) is None  # one-shot wins
    assert reduce.workspace((0, 8), torch.bfloat16) is None
    assert reduce.workspace((1 << 20, 8), torch.bfloat16) is None
    reduce.close()
    assert reduce.workspace((2, 8), torch.bfloat16) is None


def test_reducer_without_a_table_goes_direct() -> None:
    reduce = AllReduce(lambda x: None)
    reduce.add("registered", lambda x: None, torch.zeros(1 << 16, dtype=torch.uint8))
    assert reduce.path_of(torch.zeros(8)) == "direct"
    assert reduce.workspace((8,), torch.float32) is None


def test_every_path_gives_the_sum_over_gloo() -> None:
    run_world(2, bodies.every_path)


def test_bytes_reach_every_rank() -> None:
    run_world(3, bodies.bytes_across)


def test_ranks_agree_on_the_table_of_rank_0(tmp_path: Path) -> None:
    """The first start measures on every rank; the next finds the table, though only rank 0 can."""
    first = run_world(2, bodies.agreement, str(tmp_path), 1)
    assert first[0] == first[1]
    assert [count for _, count in first] == [1, 1]
    assert PathTable.from_json(first[0][0]).us == {"direct": {1024: 11.0}}
    second = run_world(2, bodies.agreement, str(tmp_path), 2)
    assert second == [(first[0][0], 0)] * 2


def test_symmetric_memory_finds_the_group_by_name(tmp_path: Path) -> None:
    """As far as it goes without a GPU: torch resolves the names to these groups."""
    store = meet(tmp_path, 1, 5.0)
    groups = [gloo_group(0, 1, PrefixStore(str(i), store), 5.0) for i in range(2)]
    names = [register(group, store) for group in groups]
    assert len(set(names)) == 2
    for name, group in zip(names, groups, strict=True):
        assert group.group_name == name
        assert _resolve_process_group(name) is group


def test_ranks_meet_whatever_their_processes_exchanged_before() -> None:
    """As torch's symmetric memory does it, `StoreExchange`: its keys bear a number that a process counts up."""
    shared = HashStore()
    shared.set_timeout(timedelta(seconds=60))

    def exchange(rank: int, number: int) -> list[bytes]:
        place, seen = PrefixStore("group", keys := CommonKeys(shared)), []  # C++ calls back into Python
        for at in (number, number + 2):
            own = [f"CUDASymmetricMemory/{at}/{r}" for r in range(2)]
            place.set(own[rank], bytes([rank, at]))
            place.wait(own)
            seen += [place.get(key)[:1] for key in own]
            seen += [data[:1] for data in place.multi_get(own)]
            place.barrier(f"CUDASymmetricMemory/{at + 1}", 2)
        del keys
        return seen

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(exchange, (0, 1), (0, 17)))
    assert answers == [[b"\0", b"\1"] * 4] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("size", [2, 4])
def test_one_shot_gives_the_sum_under_the_interpreter(size: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_world(size, bodies.one_shot, str(tmp_path))
