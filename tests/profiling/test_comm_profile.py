"""`minisgl profile comm`: its arithmetic on made-up times, and the whole of it between two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comm_bodies
import pytest
import torch

from minisgl.cli import main
from minisgl.cli.lab.comm import bytes_text
from minisgl.profiling import comm
from minisgl.profiling.collective_cases import SPEC
from minisgl.profiling.correctness import verify
from minisgl.profiling.ranks import run_ranks
from minisgl.profiling.record import read
from minisgl.types import CommunicationError, MinisglError

KIB, MIB = 1 << 10, 1 << 20
# Made up. One-shot is flat, then steep; NCCL has a high floor.
ROWS = [
    *(comm.row("all_reduce", "one_shot", n, 8, [us] * 3) for n, us in ((KIB, 5.0), (256 * KIB, 10.0), (MIB, 40.0))),
    *(comm.row("all_reduce", "direct", n, 8, [us] * 3) for n, us in ((KIB, 20.0), (256 * KIB, 20.0), (MIB, 30.0))),
    comm.row("all_gather", "direct", MIB, 8, [10.0]),
    comm.row("copy", "registered", MIB, 8, [2.0]),
]


def test_bandwidths_count_as_nccl_tests_do() -> None:
    reduce = comm.row("all_reduce", "direct", 8 * MIB, 4, [100.0, 50.0, 80.0])
    assert reduce["us"]["median"] == 80.0
    assert reduce["algo_gbps"] == pytest.approx(8 * MIB / 80e-6 / 1e9)
    assert reduce["bus_gbps"] == pytest.approx(reduce["algo_gbps"] * 2 * 3 / 4)
    gather = comm.row("all_gather", "direct", 8 * MIB, 4, [80.0])
    assert gather["bus_gbps"] == pytest.approx(gather["algo_gbps"] * 3 / 4)
    assert comm.row("all_reduce", "direct", KIB, 1, [1.0])["bus_gbps"] == 0.0  # one GPU uses no link
    copy = comm.row("copy", "registered", KIB, 1, [1.0])
    assert copy["bus_gbps"] == pytest.approx(2 * copy["algo_gbps"])  # read and written


def test_crossovers_name_the_fastest_by_size() -> None:
    assert comm.crossovers(ROWS, "all_reduce") == [(256 * KIB, "one_shot"), (MIB, "direct")]
    assert comm.crossovers(ROWS, "all_reduce", ["direct"]) == [(MIB, "direct")]
    assert comm.crossovers(ROWS, "all_gather") == [(MIB, "direct")]


def test_share_follows_from_the_shape() -> None:
    """Qwen3-8B: 36 layers, a hidden state of 4096 bf16, so 512 KiB at batch 64."""
    found = comm.share(ROWS, "qwen3-8b", weights_us=60.0)
    steps = {step["batch"]: step for step in found["batches"]}
    assert [steps[b]["bytes"] for b in (1, 8, 64, 256)] == [8 * KIB, 64 * KIB, 512 * KIB, 2 * MIB]
    table = comm.as_table(ROWS, "all_reduce")
    assert steps[64]["path"] == "one_shot"
    assert steps[64]["layer_us"] == pytest.approx(2 * table.estimate("one_shot", 512 * KIB)) == pytest.approx(40.0)
    assert steps[64]["token_us"] == pytest.approx(36 * 40.0)
    assert steps[64]["share"] == pytest.approx(0.4)
    assert (found["layer_us"], found["token_us"]) == (steps[64]["layer_us"], steps[64]["token_us"])


def test_layer_bytes_are_those_of_its_matrices() -> None:
    """SmolLM2: 576 wide, 9 query and 3 key-value heads of 64, an MLP of 1536."""
    expected = 576 * 64 * (9 + 2 * 3) + 9 * 64 * 576 + 3 * 576 * 1536
    assert comm.layer_bytes("smollm2", 4) == 4 * expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the tests marked cuda run it there")
def test_two_processes_are_measured_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "comm", "--quick", "--tp", "2", "--out", str(tmp_path)]) == 0
    record = read(tmp_path / "comm.json")
    assert {(row["op"], row["path"]) for row in record.rows} == {("all_reduce", "gloo"), ("all_gather", "gloo")}
    assert [row["bytes"] for row in record.rows if row["op"] == "all_reduce"] == list(comm.QUICK_SIZES)
    for row in record.rows:
        assert (row["world"], row["algo_gbps"]) == (2, pytest.approx(row["bytes"] / row["us"]["median"] / 1e3))
    assert (record.summary["device"], record.hardware["device"], record.summary["model"]) == ("cpu", "cpu", "smollm2")
    assert [note["what"] for note in record.skipped] == ["NCCL and its paths"]
    printed = capsys.readouterr().out
    assert "all_reduce, 2 ranks" in printed and "share at most" in printed and "skipped NCCL" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("options", "message"), [(["--tp", "0"], "--tp is 0"), (["--tp", "1"], "no other to talk to")])
def test_ranks_that_cannot_be_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(MinisglError, match=message):
        comm_main([*options, "--out", str(tmp_path)])


def comm_main(options: list[str]) -> Any:
    """The action itself: `main` would print the error and exit."""
    import argparse

    from minisgl.cli.lab import comm as action

    parser = argparse.ArgumentParser()
    action.add_options(parser)
    action.run(parser.parse_args(options))


def test_ranks_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are forked from a process that may have been started long before."""
    for value in ("one", "two"):
        monkeypatch.setenv("MINISGL_TEST_VALUE", value)
        assert run_ranks(2, "cpu", comm_bodies.environment, "MINISGL_TEST_VALUE", limit_s=120.0) == [value, value]


def test_failing_rank_is_an_error_with_its_traceback() -> None:
    with pytest.raises(CommunicationError, match=r"rank \d of 2: (?s:.)*measure_rank"):
        run_ranks(2, "cpu", comm.measure_rank, limit_s=120.0)  # without its arguments


@pytest.mark.parametrize("dtype", list(SPEC.tolerance), ids=str)
@pytest.mark.parametrize("shape", SPEC.cases, ids=str)
def test_gloo_is_right_by_the_registry(shape: dict[str, int], dtype: torch.dtype) -> None:
    outcome = verify(SPEC, lambda *args: SPEC.run(*args, version="gloo"), shape, dtype, torch.device("cpu"), seed=3)
    assert outcome.ok, outcome.problem


@pytest.mark.parametrize(("count", "text"), [(1, "1 B"), (2304, "2304 B"), (4096, "4 KiB"), (3 * MIB, "3 MiB")])
def test_sizes_are_written_in_whole_units(count: int, text: str) -> None:
    assert bytes_text(count) == text
