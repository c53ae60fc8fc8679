"""One decode step of a model over several ranks: its time, and how much of it is communication.

    python benchmarks/tp_step.py --shape qwen3-8b --tp 2 [--batch 64] [--context 512] [--steps 30] [--save FILE]

Random weights of the model's shape, tokens drawn at temperature 0.6. The step's time is the mean over `--steps`,
without a profiler. On a GPU rank 0's kernels are then traced over as many steps: those of NCCL, of torch's symmetric
memory and our one-shot sum are communication. What a rank waits for another counts as communication too, since it
waits in them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from common import environment, spread

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.engine.lead import make_engine
from minisgl.profiling.shapes import SHAPES, shape_folder
from minisgl.types import SamplingParams

COMMUNICATION = ("nccl", "one_shot", "two_shot")  # in the names of kernels
WARM_UP = 8


def fill(engine: Engine, batch: int, context: int, outputs: int) -> None:
    """Starts `batch` requests of `context` random tokens; returns when each has its first token."""
    rng = random.Random(0)
    params = SamplingParams(temperature=0.6, max_tokens=outputs, ignore_eos=True, seed=1).resolve({}, ())
    for i in range(batch):
        prompt = array("i", [rng.randrange(engine.vocab_size) for _ in range(context)])
        engine.add(str(i), prompt, params)
    waiting = {str(i) for i in range(batch)}
    while waiting:
        waiting -= {output.id for output in engine.step()}


def step_us(engine: Engine, steps: int) -> list[float]:
    """Microseconds of each of `steps`: with steps that overlap, from one's tokens to the next one's."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - began) * 1e6)
    return times


def kernels_us(engine: Engine, steps: int) -> dict[str, Any]:
    """What rank 0's kernels take in a step, and those that communicate by name."""
    # not torch.profiler's: it imports the compiler, for ten seconds
    with torch.autograd.profiler.profile(use_cpu=False, use_device="cuda", use_kineto=True) as traced:
        step_us(engine, steps)
        torch.cuda.synchronize()
    events = [e for e in traced.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    totals = {e.key: (e.count / steps, e.self_device_time_total / steps) for e in events}
    talk = {name: found for name, found in totals.items() if any(part in name.lower() for part in COMMUNICATION)}
    return {
        "kernels_us": sum(us for _, us in totals.values()),
        "communication_us": sum(us for _, us in talk.values()),
        "communication": {name[:80]: {"calls": calls, "us": us} for name, (calls, us) in talk.items()},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    outputs = 2 * args.steps + 2 * WARM_UP + args.batch + 64
    length = args.context + outputs
    with shape_folder(args.shape) as folder:
        config = EngineConfig(
            model=str(folder),
            dummy_weights=True,
            tp_size=args.tp,
            max_running=args.batch,
            max_model_len=length,
            num_pages=args.batch * (length // 16 + 2),
            prefix_cache=False,
        )
        engine = make_engine(config)
        try:
            fill(engine, args.batch, args.context, outputs)
            step_us(engine, WARM_UP)
            times = step_us(engine, args.steps)
            found: dict[str, Any] = {"step_us": sum(times) / len(times), "spread_us": spread(times)}
            if engine.device.type == "cuda":
                found |= kernels_us(engine, args.steps)
                found["communication_share"] = found["communication_us"] / found["step_us"]
        finally:
            engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-8b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save", type=Path, metavar="FILE", help="append the result as a line of JSON")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("shape", "tp", "batch", "context", "steps")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = {"bench": "tp_step", **environment(device), "settings": settings, **measure(args)}
    print(json.dumps(record, indent=1))
    if args.save:
        with args.save.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
