"""The measuring actions from end to end, on the machine at hand and with few sizes; on what a record says."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.cli import main
from minisgl.cli.lab.env import turns
from minisgl.kernels.spec import KernelSpec, Version
from minisgl.profiling import catalogue, scatter
from minisgl.profiling.record import Record, read

ROOT = Path(__file__).resolve().parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def profile(action: str, folder: Path, *more: str) -> Record:
    assert main(["profile", action, "--quick", "--out", str(folder), *more]) == 0
    return read(folder / f"{action}.json")


def check_rows(rows: list[dict[str, Any]]) -> None:
    """What must hold of any measurement: nothing negative, the floor's fraction and the rate follow from the time."""
    assert rows
    for row in rows:
        us = row["us"]
        assert 0 < us["p10"] <= us["median"] <= us["p90"]
        assert row["fraction"] == pytest.approx(row["floor_us"] / us["median"])
        assert row["gbps"] == pytest.approx(row["bytes"] / us["median"] / 1e3)
        assert row["limit"] in ("launch", "L2", "HBM", "compute", "cpu")


def test_env_measures_ceilings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = profile("env", tmp_path)
    assert record.ceilings["cpu_gbps"] > 0 and record.ceilings["cpu_tflops"] > 0 and record.ceilings["call_us"] > 0
    assert record.summary["num_cores"] >= 1
    printed = capsys.readouterr().out
    assert "ceilings" in printed and str(tmp_path / "env.json") in printed
    if record.hardware["cuda"] is None:
        assert "skipped the GPU's ceilings" in printed


def test_turns_are_where_limits_meet() -> None:
    gpu = {"launch_pdl_us": 0.5, "hbm_gbps": 3000.0, "bf16_tflops": 780.0, "call_us": 0.6, "cpu_gbps": 10.0}
    assert [line[2] for line in turns(gpu)] == ["1500", "260"]
    assert [line[2] for line in turns({"call_us": 0.5, "cpu_gbps": 10.0, "cpu_tflops": 0.1})] == ["5", "10"]
    assert len(turns({name: x for name, x in gpu.items() if "launch" not in name})) == 1


def test_kernels_are_right_or_skipped_with_a_reason(tmp_path: Path) -> None:
    record = profile("kernels", tmp_path)
    assert record.rows and all(row["ok"] for row in record.rows)
    run = {(row["kernel"], row["version"]) for row in record.rows}
    skipped = {note["what"] for note in record.skipped if note["why"]}
    for spec in catalogue.catalogue().values():
        for version in spec.versions:
            assert (spec.name, version.name) in run or f"{spec.name} {version.name}" in skipped
    assert ("radix", "python") in run


def test_kernels_fails_where_a_kernel_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    radix = catalogue.catalogue()["radix"]

    def wrong(keys: torch.Tensor, queries: torch.Tensor, pages: torch.Tensor, left: torch.Tensor, **_: object) -> None:
        radix.reference(keys, queries, pages, left)
        pages[0, 0] += 1

    version = Version("off by one", "cpu", lambda *_: None, radix.versions[0].prepare)
    broken: KernelSpec = replace(radix, run=wrong, versions=(version,))
    monkeypatch.setattr(catalogue, "catalogue", lambda: {"radix": broken})
    with pytest.raises(SystemExit, match="1"):
        main(["profile", "kernels", "--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert "radix off by one int32" in capsys.readouterr().err
    assert [row["ok"] for row in read(tmp_path / "kernels.json").rows] == [False, False]


def test_kernels_goes_on_where_a_kernel_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    radix = catalogue.catalogue()["radix"]

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    version = Version("broken", "cpu", lambda *_: None, radix.versions[0].prepare)
    broken: KernelSpec = replace(radix, run=breaks, versions=(version,))
    monkeypatch.setattr(catalogue, "catalogue", lambda: {"broken": broken, "radix": radix})
    with pytest.raises(SystemExit, match="1"):
        main(["profile", "kernels", "--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    verdicts = {row["version"]: row["ok"] for row in read(tmp_path / "kernels.json").rows}
    assert verdicts.pop("broken") is False and verdicts and all(verdicts.values())


def test_kernels_in_several_processes_are_the_same(tmp_path: Path) -> None:
    one, two = (profile("kernels", tmp_path / n, "--kernels", "radix,store", "--jobs", n) for n in ("1", "2"))
    assert one.rows and one.rows == two.rows and one.skipped == two.skipped


def test_kernels_checks_those_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = profile("kernels", tmp_path, "--kernels", "radix")
    assert {row["kernel"] for row in record.rows} == {"radix"}
    assert main(["profile", "kernels", "--out", str(tmp_path), "--kernels", "radix,nothing"]) == 1
    assert "--kernels names nothing; there are:" in capsys.readouterr().err


def test_gpu_script_checks_kernels_that_exist() -> None:
    names = re.findall(r"^ours=(.*)$", (ROOT / "benchmarks" / "gpu_kernels.sh").read_text(), re.M)[0].split(",")
    on_gpu = {spec.name for spec in catalogue.catalogue().values() if spec.on_gpu}
    assert set(names) == on_gpu


def test_index_has_torch_and_what_runs_here(tmp_path: Path) -> None:
    record = profile("index", tmp_path)
    check_rows(record.rows)
    assert {"copy", "torch"} <= {row["version"] for row in record.rows}
    if not torch.cuda.is_available():
        assert "index v2" in {note["what"] for note in record.skipped}
    assert record.summary["launch_ends"]


def test_store_tells_the_cost_of_scatter(tmp_path: Path) -> None:
    record = profile("store", tmp_path)
    check_rows(record.rows)
    assert {row["order"] for row in record.rows} == {"random", "sequential", "sorted", "paged"}
    assert {cost["version"] for cost in record.summary["scatter_percent"]} >= {"torch"}


def test_scatter_cost_is_relative_to_sequential_slots() -> None:
    def row(order: int, us: float) -> dict[str, Any]:
        case = {"tokens": 64, "heads": 8, "head_dim": 128, "order": order}
        return {"version": "v2", "case": case, "dtype": "float16", "config": None, "us": {"median": us}}

    (cost,) = scatter.scatter_cost([row(0, 3.0), row(1, 2.0), row(2, 2.5), row(3, 2.0)])
    assert cost["percent"] == pytest.approx({"random": 50.0, "sorted": 25.0, "paged": 0.0})
    assert (cost["tokens"], cost["width"]) == (64, 1024)


def test_attention_has_both_phases(tmp_path: Path) -> None:
    record = profile("attention", tmp_path)
    check_rows(record.rows)
    assert {row["phase"] for row in record.rows} == {"decode", "prefill"}
    assert "torch_sdpa" in {row["backend"] for row in record.rows}


def test_attention_names_the_models_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "attention", "--out", str(tmp_path), "--model", "gpt-9"]) == 1
    assert "expected one of: qwen3-0.6b" in capsys.readouterr().err


@no_gpu
def test_script_is_the_action(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "00_check_env.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "minisgl profile env" in done.stdout
