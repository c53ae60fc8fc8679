"""The whole pipeline on this machine, as anyone would run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "06_full_pipeline.sh"
KINDS = "env kernels index store attention comm tp rulings load request step compare".split()

PAGES = ("final-report.md", "analysis.md", "environment.md", "kernel-dev-guide.md")
MEASURED = (
    "Executive summary",
    "The way of one request",
    "Where a decode step's time goes",
    "Communication between ranks",
    "Timeline of a tensor-parallel step",
    "A served model under load",
    "Opportunities, by priority",
    "Rulings on claims",
    "Expected and measured",
    "Conclusions",
)


@pytest.mark.timeout(1500)  # half a minute of work, on a machine of its own
def test_quick_pipeline_measures_and_reports_everything(tmp_path: Path, smollm2: Path) -> None:
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = sorted((ROOT / "reports").rglob("*"))
    args = [SCRIPT, "--quick", "--out", tmp_path]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=1400)
    logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted((tmp_path / "logs").iterdir()))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}\n{logs}"
    assert "13/13" in done.stderr and "report.html" in done.stdout

    for kind in KINDS:
        record = json.loads((tmp_path / f"{kind}.json").read_text())
        assert record["quick"], kind
        assert record["rows"] or kind == "compare", kind
    final = (tmp_path / "report" / "final-report.md").read_text()
    assert tuple(re.findall(r"^## (.*)", final, re.M)) == MEASURED
    for heading in MEASURED:
        body = final.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        assert body.strip() and "_Not measured" not in body, heading
    analysis = (tmp_path / "report" / "analysis.md").read_text()
    for kind in ("Correctness", "index", "store", "attention"):
        assert f"\n## {kind}\n" in analysis
    assert "_Not measured: this machine" not in (tmp_path / "report" / "environment.md").read_text()
    index = (tmp_path / "report" / "INDEX.md").read_text()
    assert {kind for kind in KINDS if f"| {kind} | not measured |" in index} == set()
    assert all(f"]({page})" in index for page in PAGES) and "## " in (tmp_path / "report" / PAGES[-1]).read_text()
    plots = {path.name for path in (tmp_path / "report" / "plots").iterdir()}
    assert {"request.svg", "step.svg", "roofline.svg", "tp.svg", "comm-all_reduce.svg"} <= plots
    assert sorted((ROOT / "reports").rglob("*")) == before, "reports/ changes only on request"


def test_pipeline_explains_itself(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--write-reports" in done.stdout and not re.search(r"^#", done.stdout, re.M)


def test_failed_step_is_named_and_stops_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *02_*) echo broken; exit 3;; esac\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run([SCRIPT, "--quick", "--out", tmp_path / "o"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"failed: index, see {tmp_path}/o/logs/index.log"
    assert "13/13" in done.stderr
