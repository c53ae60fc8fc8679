"""Everything about several GPUs, in one command: links, collectives, whole models, tests, and what came of it.

    python benchmarks/multi_gpu.py OUT [--budget 480] [--steps comm step ...] [--worlds 2 4]

Needs this checkout and the packages of minisgl[cuda], pytest among those of [dev], and no network. Each step is made of
processes that have a time of their own, the most wanted first; one that fails or takes too long doesn't keep the next
from running, and what no time is left for is named. OUT gets a log for each, the records, results.jsonl, and
summary.json: written anew after each process, printed at the end.

    comm     collectives by path and size, for each world; the start's parts (minisgl profile comm)
    step     one decode step at batch 64: how much communicates   (benchmarks/tp_step.py)
    offline  offline256 over 1, 2, 4 … GPUs                       (minisgl bench offline)
    tp       when a decode step of a split model communicates     (minisgl profile tp)
    rulings  every claim, those on collectives among them         (minisgl profile rulings)
    tests    the communicator, tensor-parallel models, their ranks (pytest -m cuda tests/distributed)
    env      clocks, links between the GPUs, bandwidths           (minisgl profile env)

What needs one GPU runs beside its like, each on a GPU of its own and a share of the CPU.
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
STEPS = ("comm", "step", "offline", "tp", "rulings", "tests", "env")
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
    """A process of a step, which `limit_s` ends. `gpu`: the only one that it sees, else it has all."""

    name: str
    command: list[str]
    limit_s: float
    gpu: int | None = None


def rounds(steps: Sequence[str], worlds: Sequence[int], out: Path) -> Iterator[list[Job]]:
    """What is to run, the most wanted first; the jobs of a round run side by side."""
    python, results = sys.executable, str(out / "results.jsonl")
    minisgl = [python, "-m", "minisgl"]
    comm = [
        [Job(f"comm-{n}", [*minisgl, "profile", "comm", "--tp", str(n), "--out", str(out / f"comm-{n}")], 60)]
        for n in worlds
    ]
    command = [python, "benchmarks/tp_step.py", "--batch", "64", "--context", "512", "--save", results]
    step = of_shapes("step", command, worlds, 60)
    offline = of_shapes("offline", [*minisgl, "bench", "offline", "--save", results], worlds, 90)
    tp = [[Job("tp", [*minisgl, "profile", "tp", "--out", str(out)], 90)]]
    rulings = [[Job("rulings", [*minisgl, "profile", "rulings", "--out", str(out)], 240)]]
    pytest = [python, "-m", "pytest", "-q", "-x", "-m", "cuda", "-p", "no:cacheprovider"]
    tests = [
        [Job("tests-ranks", [*pytest, "tests/distributed/test_ranks_cuda.py"], 150)],
        [Job("tests-comm", [*pytest, "tests/distributed/test_comm_cuda.py"], 150)],
        [Job("tests-models", [*pytest, "tests/distributed/test_models.py"], 120)],
    ]
    env = [[Job("env", [*minisgl, "profile", "env", "--quick", "--out", str(out)], 60)]]
    first = 1 + len(worlds)  # the rounds of the first shape
    for name, part in (
        ("comm", comm), ("step", step[:first]), ("offline", offline), ("step", step[first:]), ("tp", tp),
        ("rulings", rulings), ("tests", tests), ("env", env),
    ):  # fmt: skip
        if name in steps:
            yield from part


def of_shapes(name: str, command: list[str], worlds: Sequence[int], limit_s: float) -> list[list[Job]]:
    """`command` for the shapes on one GPU, all at once; then each shape over more."""
    found = [[
        Job(f"{name}-{shape}-1", [*command, "--shape", shape, "--tp", "1"], limit_s, gpu)
        for gpu, shape in enumerate(SHAPES)
    ]]  # fmt: skip
    for shape in SHAPES:
        more = ["--shape", shape, "--tp"]
        found += [[Job(f"{name}-{shape}-{n}", [*command, *more, str(n)], limit_s)] for n in worlds]
    return found


def run(jobs: Sequence[Job], out: Path, limit_s: float) -> list[dict[str, Any]]:
    """Runs `jobs` side by side, the output of each in a log, for `limit_s` at most; what came of them."""
    began = time.monotonic()
    processes = [start(job, out, i, len(jobs)) for i, job in enumerate(jobs)]
    done = []
    for job, process in zip(jobs, processes, strict=True):
        limit = min(job.limit_s, limit_s)
        try:
            code: int | str = process.wait(max(0.0, began + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = f"ended after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # its ranks with it
            process.wait()
        seconds = time.monotonic() - began
        last = (out / f"{job.name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        print(f"{job.name}: exit {code}, {seconds:.0f} s", *last, sep="\n    ", flush=True)
        done.append({"job": job.name, "exit": code, "seconds": round(seconds, 1)})
    return done


def start(job: Job, out: Path, place: int, of: int) -> subprocess.Popen[bytes]:
    """Starts `job`, the one at `place` of as many as share the CPU."""
    # an installed package, with its C++ extension, before the sources
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "src")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if job.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[job.gpu] if visible else str(job.gpu)
    cores = sorted(os.sched_getaffinity(0))
    own = cores[place * len(cores) // of : (place + 1) * len(cores) // of] or cores
    with (out / f"{job.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            job.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    os.sched_setaffinity(process.pid, own)
    return process


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
    for jobs in rounds(args.steps, worlds, out):
        left = end - time.monotonic()
        if left < 20:
            done += [{"job": job.name, "exit": "no time left"} for job in jobs]
        else:
            done += run(jobs, out, left)
        text = json.dumps(summarise(out, worlds, done), indent=1, allow_nan=True).replace("NaN", "null")
        (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(job["exit"] != 0 for job in done))


if __name__ == "__main__":
    sys.exit(main())
