"""The GPU benchmark's dry run: what measures must not break unseen between two visits to a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import minisgl

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_gpu_benchmark_goes_through_every_part(tmp_path: Path) -> None:
    out = tmp_path / "engine.jsonl"
    command = [sys.executable, "bench_gpu.py", "--tiny", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "BENCH_BEGAN": "0"}
    env["PYTHONPATH"] = str(Path(minisgl.__file__).parent.parent)
    done = subprocess.run(command, cwd=BENCHMARKS, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    parts = ["start", "offline", "decode", "breakdown", "prefill", "host", "launch", "sampling", "mixed"]
    assert [row["part"] for row in rows] == [*parts, "plain", "eager"]
    assert not [row["error"] for row in rows if "error" in row]
    assert all(row["shape"] == "tiny" and row["bench"] == "gpu" for row in rows)
    assert rows[0]["first_token_s"] > 1e9, "the shell may say when the process began"
    assert rows[1]["tokens"] == rows[9]["tokens"] == rows[10]["tokens"] > 0
