"""Everything about several GPUs, in one command: tests, links, collectives, whole models, and what came of it.

    python benchmarks/multi_gpu.py OUT [--budget 480] [--steps tests comm ...] [--worlds 2 4]

Needs this checkout and the packages of minisgl[cuda], pytest among those of [dev], and no network. Each step is made of
processes that have a time of their own; one that fails or takes too long doesn't keep the next from running, and what
no time is left for is named. OUT gets a log for each, the records, results.jsonl, and summary.json, which is printed.

    env      clocks, links between the GPUs, bandwidths           (minisgl profile env)
    comm     collectives by path and size, for each world         (minisgl profile comm)
    tests    the communicator, tensor-parallel models, their ranks (pytest -m cuda tests/distributed)
    step     one decode step at batch 64: how much communicates   (benchmarks/tp_step.py)
    offline  offline256 over 1, 2, 4 … GPUs                       (minisgl bench offline)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("env", "comm", "tests", "step", "offline")
SHAPES = ("qwen3-8b", "qwen3-14b")
KIB, MIB = 1 << 10, 1 << 20
# Microseconds of an all-reduce on 2, 4 and 8 H100s, as published for a custom kernel; not measured by this project.
PUBLISHED = {
    4 * KIB: {2: 3.9, 4: 3.7, 8: 5.7},
    32 * KIB: {2: 4.5, 4: 4.8, 8: 7.8},
    256 * KIB: {2: 7.9, 4: 13.9, 8: 16.7},
    1 * MIB: {2: 19.9, 4: 31.1, 8: 33.8},
}
LINK_BYTES = 8 * MIB


@dataclass(frozen=True)
class Job:
    """A process of a step. `limit_s` ends it. `files`: what it appends to or writes, for the summary."""

    name: str
    command: list[str]
    limit_s: float


def jobs(steps: Sequence[str], worlds: Sequence[int], out: Path) -> Iterator[Job]:
    """What is to run, the most wanted first."""
    python, results = sys.executable, str(out / "results.jsonl")
    minisgl = [python, "-m", "minisgl"]
    table: dict[str, list[Job]] = {name: [] for name in STEPS}
    table["env"] = [Job("env", [*minisgl, "profile", "env", "--quick", "--out", str(out)], 60)]
    table["comm"] = [
        Job(f"comm-{n}", [*minisgl, "profile", "comm", "--tp", str(n), "--out", str(out / f"comm-{n}")], 90)
        for n in worlds
    ]
    tests = [python, "-m", "pytest", "-q", "-x", "-m", "cuda", "-p", "no:cacheprovider"]
    table["tests"] = [
        Job("tests-comm", [*tests, "tests/distributed/test_comm_cuda.py"], 150),
        Job("tests-models", [*tests, "tests/distributed/test_models.py"], 120),
        Job("tests-ranks", [*tests, "tests/distributed/test_ranks_cuda.py"], 120),
    ]
    step = [python, "benchmarks/tp_step.py", "--batch", "64", "--context", "512", "--save", results]
    for shape in SHAPES:
        for n in (1, *worlds):
            more = ["--shape", shape, "--tp", str(n)]
            table["step"].append(Job(f"step-{shape}-{n}", [*step, *more], 75))
            bench = [*minisgl, "bench", "offline", "--save", results, *more]
            table["offline"].append(Job(f"offline-{shape}-{n}", bench, 120))
    return (job for name in STEPS if name in steps for job in table[name])


def run(job: Job, out: Path, limit_s: float) -> dict[str, Any]:
    """Runs `job`, its output in a log; what came of it."""
    began, log = time.monotonic(), out / f"{job.name}.log"
    # an installed package, with its C++ extension, before the sources
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "src")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            job.command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = f"ended after {limit_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # its ranks with it
            process.wait()
    seconds = time.monotonic() - began
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    print(f"{job.name}: exit {code}, {seconds:.0f} s", *last, sep="\n    ", flush=True)
    return {"job": job.name, "exit": code, "seconds": round(seconds, 1)}


# -- what came of it -----------------------------------------------------------------------------------------------


def summarise(out: Path, worlds: Sequence[int], done: list[dict[str, Any]]) -> dict[str, Any]:
    """All figures in one place, beside what they are to reach."""
    return {
        "jobs": done,
        "all_reduce": {n: of_comm(out / f"comm-{n}" / "comm.json", n) for n in worlds},
        "offline": scaling(out / "results.jsonl", "offline"),
        "step": scaling(out / "results.jsonl", "tp_step"),
    }


def of_comm(path: Path, world: int) -> dict[str, Any] | None:
    """The fastest path at the published sizes and at 8 MiB; None where the record is missing."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in record["rows"] if row["op"] == "all_reduce"]
    sizes = {}
    for size in (*PUBLISHED, LINK_BYTES):
        at = [row for row in rows if row["bytes"] == size]
        if not at:
            continue
        best = min(at, key=lambda row: row["us"]["median"])
        published = PUBLISHED.get(size, {}).get(world)
        us = best["us"]["median"]
        found = {"path": best["path"], "us": us, "bus_gbps": best["bus_gbps"], "published_us": published}
        plain = next((row["us"]["median"] for row in at if row["path"] == "direct"), None)
        sizes[size] = found | {"direct_us": plain, "of_published": us / published if published else None}
    start = {name: record["summary"].get(name) for name in ("start_ms", "probe_ms", "host_us", "chosen")}
    return {"sizes": sizes, **start}


def scaling(path: Path, bench: str) -> list[dict[str, Any]]:
    """Rates or times by shape and world, and how many times faster than one GPU."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for record in (json.loads(line) for line in lines):
        if record["bench"] != bench:
            continue
        settings = record["settings"]
        row = {"shape": settings.get("shape") or settings["model"], "tp": settings.get("tp") or settings["tp_size"]}
        if bench == "offline":
            row["speed"] = record["tokens_per_second"]
        else:
            row |= {"speed": 1e6 / record["step_us"], "step_us": record["step_us"]}
            row |= {"communication_share": record.get("communication_share")}
        found.append(row)
    alone = {row["shape"]: row["speed"] for row in found if row["tp"] == 1}
    return [row | {"times_one": row["speed"] / alone.get(row["shape"], math.nan)} for row in found]


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=480, metavar="S", help="seconds for all (default: 480)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--worlds", nargs="+", type=int, metavar="N", help="(default: 2, 4 and 8, as there are GPUs)")
    args = parser.parse_args()
    count = torch.cuda.device_count()
    worlds = args.worlds or [n for n in (2, 4, 8) if n <= count]
    if not worlds or max(worlds) > count:
        parser.error(f"needs {max(worlds, default=2)} GPUs; torch sees {count}")
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end, done = time.monotonic() + args.budget, []
    for job in jobs(args.steps, worlds, out):
        left = end - time.monotonic()
        if left < 20:
            done.append({"job": job.name, "exit": "no time left"})
            continue
        done.append(run(job, out, min(job.limit_s, left)))
    summary = summarise(out, worlds, done)
    text = json.dumps(summary, indent=1, allow_nan=True).replace("NaN", "null")
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(job["exit"] != 0 for job in done))


if __name__ == "__main__":
    sys.exit(main())
