"""The engine's steps against the floor that memory bandwidth sets.

    python benchmarks/bench_engine.py [--model smollm2] [--device auto] [--batches 1 4 16] [--context 128] [--no-save]

A decode step can't be faster than (weight bytes + KV bytes read) / bandwidth (of experts, those that random routing
touches; of keys and values, those inside a sliding window); the benchmark measures the bandwidth
first and prints that floor beside each figure. A CPU whose last cache holds the weights can be below
it. Prompts are random token ids; greedy; end-of-text ids ignored.
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from contextlib import ExitStack
from typing import Any

import torch
from common import append_line, environment, memory_bandwidth, spread

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.engine.graphs import batch_sizes
from minisgl.profiling.floor import kv_bytes, step_bytes
from minisgl.profiling.settled import only_decodes
from minisgl.profiling.shapes import SHAPES, shape_folder
from minisgl.profiling.skinny import skinny_parts, switch
from minisgl.types import SamplingParams

WARM_UP_STEPS = 4


def random_prompt(length: int, vocab_size: int) -> array[int]:
    return array("i", [random.randrange(vocab_size) for _ in range(length)])


def seen(engine: Engine, context: int) -> float:
    """Tokens of `context` that a query sees, on the average over layers: all, or those inside a sliding window."""
    windows = engine.model.config.windows
    return sum(min(context, window or context) for window in windows) / len(windows)


def sync(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def bench_decode(engine: Engine, batch: int, context: int, steps: int) -> list[float]:
    """Seconds of each decode step with `batch` requests of about `context` tokens."""
    filling = 2 * batch * context // (engine.config.max_batched_tokens or 1)  # steps that the first decode meanwhile
    longest = steps + 4 * WARM_UP_STEPS + filling
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=longest).resolve({}, [])
    for i in range(batch):
        prompt = random_prompt(max(1, context - steps // 2), engine.vocab_size)
        engine.add(f"decode{batch}-{i}", prompt, params)
    scheduler = engine.scheduler
    while not only_decodes(scheduler):
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    assert len(scheduler.running) == batch, "requests ended while others were still being filled in"
    for request in list(scheduler.requests):
        engine.abort(request)
    drain(engine)
    return times


def bench_prefill(engine: Engine, count: int, length: int, repeat: int) -> list[float]:
    """Seconds from adding `count` fresh prompts of `length` tokens to the first token of the last."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1).resolve({}, [])
    times = []
    for i in range(repeat + 1):
        prompts = [random_prompt(length, engine.vocab_size) for _ in range(count)]
        sync(engine)
        began = time.perf_counter()
        for k, prompt in enumerate(prompts):
            engine.add(f"prefill{i}-{k}", prompt, params)
        drain(engine)
        times.append(time.perf_counter() - began)
    return times[1:]


def report(name: str, unit: str, value: dict[str, float], floor: float | None, tokens: int) -> dict[str, Any]:
    """Prints one row; seconds in, milliseconds out."""
    ms = {key: round(v * 1e3, 3) for key, v in value.items()}
    rate = tokens / value["median"]
    fraction = f"  {floor / value['median']:4.0%} of the floor {floor * 1e3:.2f} ms" if floor else ""
    print(f"{name:24}{ms['median']:9.2f} ms  [{ms['p10']:.2f}, {ms['p90']:.2f}]  {rate:9.0f} {unit}{fraction}")
    floor_ms = None if floor is None else round(floor * 1e3, 3)
    return {"case": name, "ms": ms, "tokens_per_second": round(rate, 1), "floor_ms": floor_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--dummy-weights", action="store_true", help="random weights of the model's shape")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights of this model's shape, instead of --model"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=128, help="tokens before each decoded one (default: 128)")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed (default: 32)")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512], help="prompt lengths (default: 512)")
    parser.add_argument("--compare-skinny", action="store_true", help="decode again, all products with cuBLAS")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/engine.jsonl")
    args = parser.parse_args()
    random.seed(0)
    with ExitStack() as stack:
        run(args, str(stack.enter_context(shape_folder(args.shape))) if args.shape else args.model)


def decode_rows(engine: Engine, args: argparse.Namespace, bandwidth: float, how: str = "") -> list[dict[str, Any]]:
    rows = []
    for batch in args.batches:
        value = spread(bench_decode(engine, batch, args.context, args.steps))
        floor = (step_bytes(engine, batch) + batch * seen(engine, args.context) * kv_bytes(engine)) / bandwidth
        rows.append(report(f"decode, batch {batch}{how}", "tok/s", value, floor, batch))
    return rows


def run(args: argparse.Namespace, model: str) -> None:
    config = EngineConfig(
        model=model,
        device=args.device,
        dtype=args.dtype,
        dummy_weights=args.dummy_weights or args.shape is not None,
        overlap=False if args.no_overlap else None,
        cuda_graph=not args.no_cuda_graph,
        attention=args.attention,
        kv_cache_dtype=args.kv_cache_dtype,
        max_running=max(args.batches),
        max_batched_tokens=max(2048, *args.batches),
    )
    engine = Engine(config)
    device = engine.config.device
    bandwidth = memory_bandwidth(device)
    per_token = kv_bytes(engine)
    print(f"{environment(device)['hardware']}: memory bandwidth {bandwidth / 1e9:.1f} GB/s measured")
    name, most = args.shape or args.model, step_bytes(engine, max(args.batches))
    print(f"{name}, {engine.config.dtype}: {most / 1e6:.0f} MB of weights a step, {per_token} B of KV a token")
    rows = decode_rows(engine, args, bandwidth)
    for length in args.prefill:
        value = spread(bench_prefill(engine, 1, length, 5))
        rows.append(report(f"prefill, {length} tokens", "tok/s", value, None, length))
    if args.compare_skinny:
        parts = skinny_parts(engine.model)
        switch(parts, False)
        if engine.runner.graphs is not None:
            engine.runner.graphs = None
            engine.runner.capture(batch_sizes(max(args.batches)), progress=False)
        rows += decode_rows(engine, args, bandwidth, ", cuBLAS")
    if not args.no_save:
        settings = {k: v for k, v in vars(args).items() if k != "no_save"} | {"dtype": engine.config.dtype}
        record = environment(device) | {
            "bench": "engine",
            "settings": settings,
            "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        }
        append_line("engine.jsonl", record | {"rows": rows})


if __name__ == "__main__":
    main()
