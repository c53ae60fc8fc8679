"""Nsight Compute's table read and interpreted, and both profilers run around a command."""

from __future__ import annotations

import csv
import io
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from minisgl.cli import main
from minisgl.cli.lab import ncu as lab_ncu
from minisgl.cli.lab import tool
from minisgl.profiling import counted, ncu
from minisgl.profiling.record import read
from minisgl.types import ConfigError, MinisglError

PLACE = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
         "Device", "CC")  # fmt: skip
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "gpu__time_duration.sum": "us",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sector/request",
    "l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum": "sector",
    "l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum": "sector",
    "launch__registers_per_thread": "register/thread",
    "lts__t_sector_hit_rate.pct": "%",
    STALL.format("barrier"): "inst",
    STALL.format("long_scoreboard"): "inst",
    STALL.format("selected"): "inst",
}


def table(*launches: tuple[str, tuple[str, ...]], units: dict[str, str] | None = None) -> str:
    """As ncu prints the raw page: everything quoted, thousands apart by commas, its own lines between the program's."""
    out = io.StringIO()
    out.write('==PROF== Connected to process 4711 (/usr/bin/python3.11)\nthe program\'s own words, "quoted"\n')
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([*PLACE, *COLUMNS])
    writer.writerow(["" for _ in PLACE] + [(units or {}).get(name, unit) for name, unit in COLUMNS.items()])
    for i, (kernel, values) in enumerate(launches):
        place = (str(i), "4711", "python3.11", "127.0.0.1", kernel, "1", "7", "(128, 1, 1)", "(64, 2, 1)", "0", "9.0")
        writer.writerow([*place, *values])
    out.write("==PROF== Disconnected from process 4711\n")
    return out.getvalue()


#                      DRAM    µs       ld    spills   regs  L2     barrier  long   selected
COPY = "void copy<int, 4>(T1 *, long)", ("91.25", "1,024.50", "16", "0", "0", "24", "3.5", "0.10", "5.90", "1.00")
AGAIN = "void copy<int, 4>(T1 *, long)", ("88.75", "1,026.50", "16", "0", "0", "24", "4.5", "0.10", "5.90", "1.00")
TINY = "index_v2", ("3.10", "2.24", "n/a", "0", "0", "32", "80", "0.00", "9.00", "1.00")
SYNC = "gemm", ("61.00", "50.00", "8.5", "1,200", "34", "255", "60", "3.00", "2.00", "1.00")


def test_table_becomes_a_row_a_kernel() -> None:
    copy, tiny, sync = ncu.parse(table(COPY, TINY, AGAIN, SYNC))
    assert (copy["kernel"], copy["launches"], copy["grid"], copy["block"]) == (COPY[0], 2, "(64, 2, 1)", "(128, 1, 1)")
    assert (copy["us"], copy["dram_percent"], copy["l2_hit_percent"], copy["registers"]) == (1025.5, 90.0, 4.0, 24)
    assert (copy["dominant_stall"], copy["spill_sectors"]) == ("long_scoreboard", 0)
    assert copy["barrier_share"] == pytest.approx(0.1 / 6)
    assert tiny["sectors_per_load"] is None and tiny["occupancy_percent"] is None
    assert (sync["spill_sectors"], sync["barrier_share"], sync["dominant_stall"]) == (1234, 0.6, "barrier")


@pytest.mark.parametrize(
    ("unit", "expected"), [("ns", 0.00224), ("nsecond", 0.00224), ("usecond", 2.24), ("ms", 2240), ("second", 2.24e6)]
)
def test_times_are_microseconds_whatever_the_unit(unit: str, expected: float) -> None:
    [row] = ncu.parse(table(TINY, units={"gpu__time_duration.sum": unit}))
    assert row["us"] == pytest.approx(expected)


def test_rules_name_the_rows_that_they_apply_to() -> None:
    rows = ncu.parse(table(COPY, TINY, SYNC))
    near, far, barriers, spills = ([row["kernel"] for row in rows if rule.holds(row)] for rule in ncu.RULES)
    assert (near, far, barriers, spills) == ([COPY[0]], ["index_v2"], ["gemm"], ["gemm"])
    words = ("minor tuning", "coalescing", "asynchronous", "registers")
    assert all(word in rule.advice for word, rule in zip(words, ncu.RULES, strict=True))
    assert not any(rule.holds({"kernel": "gemm", "dram_percent": None}) for rule in ncu.RULES)


def test_launches_of_one_kernel_are_told_apart_by_their_shape(tmp_path: Path) -> None:
    """Advice goes by launch: what a small one lacks says nothing of one that fills the GPU."""
    large = table(TINY, ("index_v2", ("61.52", *TINY[1][1:]))).replace('"(64, 2, 1)"', '"(8, 32, 1)"', 2)
    large = large.replace('"(8, 32, 1)"', '"(64, 1, 1)"', 1)
    (tmp_path / "table").write_text(large)
    assert main(["profile", "ncu", "--csv", str(tmp_path / "table"), "--out", str(tmp_path)]) == 0
    record = read(tmp_path / "ncu.json")
    assert [ncu.label(row) for row in record.rows] == ["index_v2 (64 × 128)", "index_v2 (8·32 × 128)"]
    assert [len(row["advice"]) for row in record.rows] == [1, 0]
    assert record.summary["rules"][1]["kernels"] == ["index_v2 (64 × 128)"]
    assert ncu.label({"kernel": "gemm"}) == "gemm"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it said nothing"),
        ("==ERROR== ERR_NVGPUCTRPERM - The user has no permission", "only an administrator"),
        ("==PROF== Connected\n==WARNING== No kernels were profiled.\n", "No kernels were profiled"),
        ('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","k","m","","1"\n', "--page raw"),
    ],
)
def test_table_that_is_none_says_what_the_tool_said(text: str, said: str) -> None:
    with pytest.raises(MinisglError, match=said):
        ncu.parse(text)


# -- the commands --------------------------------------------------------------------------------------------------


def put_tool(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `name` on the PATH that notes its arguments and runs `body`; where the notes are."""
    path, notes = folder / name, folder / f"{name}.args"
    noted = f'for word in "$@"; do echo "$word"; done > {notes}; echo "$MINISGL_NVTX" > {notes}.nvtx'
    path.write_text(f"#!/bin/sh\n{noted}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return notes


def test_ncu_runs_the_command_and_interprets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table").write_text(table(COPY, TINY, SYNC))
    out = tmp_path / "out"
    notes = put_tool(tmp_path, "ncu", f"cp {tmp_path / 'table'} {out / 'ncu.csv'}", monkeypatch)
    assert main(["profile", "ncu", "--quick", "--out", str(out), "--kernels", "copy|index", "--", "bench", "-x"]) == 0
    words = notes.read_text().splitlines()
    line = " ".join(words)
    assert "--section MemoryWorkloadAnalysis" in line and "--target-processes all --clock-control none" in line
    assert "--csv --page raw" in line and "--kernel-name regex:copy|index --launch-count 50" in line
    assert words[-4:] == ["-m", "minisgl", "bench", "-x"]
    record = read(out / "ncu.json")
    assert [row["kernel"] for row in record.rows] == [COPY[0], "index_v2", "gemm"]
    assert record.rows[0]["advice"] == ["near the optimum: minor tuning is left"] and len(record.rows[2]["advice"]) == 2
    assert record.summary["rules"][3]["kernels"] == ["gemm (64·2 × 128)"]
    shown = capsys.readouterr().out
    assert "over 70% of peak bandwidth: near the optimum" in shown and "  gemm (64·2 × 128)\n" in shown


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """ncu as a function: of our kernels one breaks, and one has written its table when its time is up."""
    called: list[str] = []
    put_tool(tmp_path, "ncu", "exit 1", monkeypatch)

    def run_limited(command: list[str], limit_s: float) -> int | None:
        called.append(" ".join(command))
        if command[-1] == "rmsnorm":
            return 9
        Path(command[command.index("--log-file") + 1]).write_text(table(TINY))
        return None if command[-1] == "store" else 0

    monkeypatch.setattr(tool, "run_limited", run_limited)
    return called


def test_ncu_counts_our_kernels_name_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counting: list[str]
) -> None:
    """One that breaks or takes too long is left out, and those after the limit; what is there by then stays."""
    monkeypatch.setattr(counted, "COUNTED", {"index": "^index", "rmsnorm": "^rmsnorm", "store": "^s", "decode": "^_"})
    clock = iter([0.0, 1.0, 1.5, 99.5, 101.0])  # as the limit is set, and before each name
    monkeypatch.setattr(lab_ncu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert main(["profile", "ncu", "--out", str(tmp_path)]) == 0
    assert [line.split()[-1] for line in counting] == ["index", "rmsnorm", "store"]
    assert "--profile-from-start off --kernel-name regex:^index" in counting[0]
    assert "-m minisgl.profiling.counted index" in counting[0]
    record = read(tmp_path / "ncu.json")
    assert [(row["of"], row["kernel"]) for row in record.rows] == [("index", "index_v2"), ("store", "index_v2")]
    left = {note["what"]: note["why"] for note in record.skipped}
    assert "exit code 9" in left["ncu rmsnorm"] and left["ncu decode"] == "the time was up"
    assert "before it was through" in left["ncu store"]
    assert record.summary["rules"][1]["kernels"] == ["index_v2 (64·2 × 128)"] * 2


def test_ncu_counts_only_what_is_asked_for(
    tmp_path: Path, counting: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "ncu", "--kernels", "index", "--out", str(tmp_path)]) == 0
    assert main(["profile", "ncu", "--kernels", "attention", "--out", str(tmp_path)]) == 0
    assert [line.split()[-1] for line in counting] == ["index", "attention-decode", "attention-prefill"]
    assert main(["profile", "ncu", "--kernels", "gather", "--out", str(tmp_path)]) == 1
    assert "index, store, qkv_post" in capsys.readouterr().err
    assert main(["profile", "ncu", "--kernels", "rmsnorm", "--out", str(tmp_path)]) == 1
    assert "nothing was counted" in capsys.readouterr().err


def test_command_over_its_limit_is_killed() -> None:
    assert tool.run_limited(["sleep", "600"], 0.1) is None
    assert tool.run_limited(["true"], 600) == 0


@pytest.mark.parametrize("name", ["index", "store", "qkv_post", "rmsnorm"])
def test_counted_kernels_have_the_sizes_that_are_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[str, int]] = []
    monkeypatch.setattr(counted, "_kernel", lambda name, shape: shapes.append((name, shape["tokens"])))
    list(counted.calls(name))
    assert shapes == [(name, tokens) for tokens in counted.SIZES]


@pytest.mark.cuda
@pytest.mark.parametrize("name", counted.COUNTED)
def test_counted_kernels_run(name: str) -> None:
    counted.run(name)


def test_ncu_reads_a_table_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table").write_text(table(COPY))
    assert main(["profile", "ncu", "--csv", str(tmp_path / "table"), "--out", str(tmp_path)]) == 0
    assert "(none)" in capsys.readouterr().out
    assert main(["profile", "ncu", "--csv", str(tmp_path / "missing"), "--out", str(tmp_path)]) == 1


def test_ncu_that_may_not_measure_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    put_tool(tmp_path, "ncu", f"echo '==ERROR== ERR_NVGPUCTRPERM' > {out / 'ncu.csv'}; exit 1", monkeypatch)
    assert main(["profile", "ncu", "--out", str(out), "--", "true"]) == 1
    assert "only an administrator may read the counters" in capsys.readouterr().err


def test_nsys_follows_the_command_with_nvtx_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    notes = put_tool(tmp_path, "nsys", f"touch {out / 'nsys.nsys-rep'}", monkeypatch)
    assert main(["profile", "nsys", "--out", str(out), "--", "minisgl", "serve", "--port", "0"]) == 0
    words = notes.read_text().splitlines()
    assert words[0] == "profile" and {"--trace=cuda,nvtx,osrt", "--sample=none"} <= set(words)
    assert words[-5:] == ["-m", "minisgl", "serve", "--port", "0"]
    assert Path(f"{notes}.nvtx").read_text() == "1\n"


def test_nsys_that_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_tool(tmp_path, "nsys", "exit 3", monkeypatch)
    assert main(["profile", "nsys", "--out", str(tmp_path), "--", "true"]) == 1
    assert "exit code 3" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "package"), [("ncu", "nsight-compute"), ("nsys", "nsight-systems-cli")])
def test_tool_that_is_missing_is_named_with_its_package(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tool, "_PLACES", ())
    assert main(["profile", name, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{name} is not installed" in error and package in error
    assert not list(tmp_path.iterdir())


def test_tool_outside_the_path_is_found_the_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2025.1.0", "2026.2.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(tool, "_PLACES", (f"{tmp_path}/*",))
    assert tool.find("ncu", "") == str(tmp_path / "2026.2.0" / "ncu")


def test_program_that_is_none_is_refused() -> None:
    assert tool.program(["true", "-x"]) == ["true", "-x"]
    with pytest.raises(ConfigError, match="neither a program"):
        tool.program(["no-such-program"])
