"""The CPU kernels against the floors of this machine, beside PyTorch in float32.

    python benchmarks/bench_cpu.py [--kernels avx2] [--repeat 30] [--no-save]

A product can't be faster than its weights come from memory, nor than its operations at the rate of a large plain
product in float32; both rates are measured first. Weights take turns, so that none is still in a cache. Times are the
tenth percentile: what the kernel takes where nothing else runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import append_line, environment, memory_bandwidth, time_call
from torch.nn import functional as F

from minisgl.kernels.cpu import PackedMatrix, native, paged_attention

SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
BLOCK_BYTES = {"q4_1": 20, "q8_0": 34, "bf16": 64, "f32": 128}
ROWS = (1, 4, 16, 512)
CACHE = 1 << 28  # bytes that push a weight out of the caches


def flops_rate() -> float:
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(time_call(lambda: a @ a, "cpu", 10))


def in_turn(calls: list[Callable[[], object]], repeat: int) -> float:
    """Seconds of one of `calls`, which take turns."""
    turn = iter(range(1 << 30))
    return float(np.percentile(time_call(lambda: calls[next(turn) % len(calls)](), "cpu", repeat), 10))


def random_weight(format: str, rows: int, columns: int) -> PackedMatrix:
    """A weight of random bits; what they mean doesn't matter to the time."""
    matrix = PackedMatrix(rows, columns)
    values = torch.randn(rows, columns)
    if format in ("f32", "bf16"):
        matrix[:].put(format, values if format == "f32" else values.bfloat16())
    else:
        blocks = torch.randint(0, 60, (rows, columns // 32 * BLOCK_BYTES[format]), dtype=torch.uint8)
        matrix[:].put(format, blocks)
    return matrix


def bench_products(repeat: int, bandwidth: float, rate: float) -> list[dict[str, Any]]:
    lines = []
    for name, (rows, columns) in SHAPES.items():
        copies = min(16, -(-CACHE // (rows * columns)))
        packed = {f: [random_weight(f, rows, columns) for _ in range(copies)] for f in BLOCK_BYTES}
        plain = [torch.randn(rows, columns) for _ in range(copies)]
        for m in ROWS[:3] if name == "head" else ROWS:
            x = torch.randn(m, columns)
            times = {f: in_turn([lambda w=w, x=x: w.linear(x) for w in ws], repeat) for f, ws in packed.items()}  # type: ignore[misc]
            times["torch"] = in_turn([lambda w=w, x=x: F.linear(x, w) for w in plain], repeat)  # type: ignore[misc]
            num_bytes = rows * columns // 32 * BLOCK_BYTES["q4_1"]
            floor = max(num_bytes / bandwidth, 2 * m * rows * columns / rate)
            shown = "  ".join(f"{f} {t * 1e6:8.0f}" for f, t in times.items())
            q4 = times["q4_1"]
            rates = f"{num_bytes / q4 / 1e9:5.1f} GB/s {2 * m * rows * columns / q4 / 1e9:4.0f} GFLOP/s"
            print(f"{name:8}{m:4} × {columns} → {rows:5}   {shown} µs   q4_1: {rates}, {floor / q4:4.0%} of the floor")
            lines.append({"op": name, "m": m, "us": {f: round(t * 1e6, 1) for f, t in times.items()}})
    return lines


def bench_attention(repeat: int, bandwidth: float, rate: float) -> list[dict[str, Any]]:
    heads, kv_heads, dim, lines = 9, 3, 64, []
    for sequences, queries, tokens in ((1, 1, 512), (16, 1, 512), (1, 512, 512), (1, 512, 4096)):
        pages = sequences * tokens // 16
        keys, values = (torch.randn(pages, 16, kv_heads, dim) for _ in range(2))
        q = torch.randn(sequences * queries, heads, dim)
        table = torch.randperm(pages, dtype=torch.int32).view(sequences, -1)
        lens = torch.full((sequences,), tokens, dtype=torch.int32)
        starts = torch.arange(sequences + 1, dtype=torch.int32) * queries
        call = lambda a=(q, keys, values, table, lens, starts): paged_attention(*a, 0.125, None)  # type: ignore[misc] # noqa: E731
        seconds = in_turn([call], repeat)
        flops = 4 * sequences * heads * dim * (queries * tokens - queries * (queries - 1) // 2)
        floor = max(8 * pages * 16 * kv_heads * dim / bandwidth, flops / rate)
        print(
            f"attention: {sequences} × {queries} queries over {tokens} tokens: {seconds * 1e6:.0f} µs, "
            f"{flops / seconds / 1e9:.0f} GFLOP/s, {floor / seconds:.0%} of the floor"
        )
        lines.append({"op": "attention", "shape": [sequences, queries, tokens], "us": round(seconds * 1e6, 1)})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", choices=native.cpu_available_kernels(), help="instead of the best")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/cpu.jsonl")
    args = parser.parse_args()
    if args.kernels:
        native.cpu_select_kernels(args.kernels)
    bandwidth, rate = memory_bandwidth("cpu"), flops_rate()
    place = environment("cpu")
    print(f"{place['hardware']}: kernels {native.cpu_kernels()}, {native.cpu_threads()} threads")
    print(f"measured: memory {bandwidth / 1e9:.1f} GB/s, a plain product of 1024³ {rate / 1e9:.0f} GFLOP/s")
    rows = bench_products(args.repeat, bandwidth, rate) + bench_attention(args.repeat, bandwidth, rate)
    if not args.no_save:
        ceilings = {"bandwidth_gb_s": round(bandwidth / 1e9, 1), "gflop_s": round(rate / 1e9)}
        record = place | {"bench": "cpu", "kernels": native.cpu_kernels(), **ceilings}
        append_line("cpu.jsonl", record | {"rows": rows})


if __name__ == "__main__":
    main()
