"""A layer's mixture of experts on a GPU: every tile against the bytes of the experts that were touched.

    python benchmarks/bench_moe.py [--tokens 1,32,256,4096] [--no-save]

The shape is Qwen3-30B-A3B's. Microseconds a call from the replay of a CUDA graph over so many layers that they exceed
the L2 cache three times, routing drawn at random for each. The floor is the larger of the bytes of the experts touched
over the measured copy bandwidth and the operations over the measured rate of a large product. `chosen` is the tile that
the engine takes; `torch` goes expert by expert, as the engine does without Triton, and asks the host.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import append_line, environment, memory_bandwidth, spread, time_call

from minisgl.kernels.moe import triton_v1
from minisgl.kernels.moe.triton_v1 import LARGE, TILES, Tile, choose_tile
from minisgl.profiling.ceilings import product_rate
from minisgl.profiling.replay import replay_us
from minisgl.profiling.shapes import SHAPES

CONFIG = SHAPES["qwen3-30b-a3b"]
HIDDEN, INNER = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
EXPERTS, TOP_K = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
DTYPE = torch.bfloat16
LAYERS = 3  # 3.6 GB of experts: far more than any L2 cache
MORE = (
    Tile(16, 64, 128, 4, 4), Tile(16, 32, 256, 4, 3), Tile(16, 128, 64, 4, 4), Tile(32, 128, 64, 4, 3),
    Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 32, 4, 4),
)  # fmt: skip
Layer = tuple[torch.Tensor, ...]


def make_layers(tokens: int, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Layer]:
    """x, logits, gate_up, down, out of each layer."""
    x = torch.randn(LAYERS, tokens, HIDDEN, dtype=DTYPE, device="cuda")
    logits = torch.randn(LAYERS, tokens, EXPERTS, dtype=DTYPE, device="cuda")
    return [(x[i], logits[i], *weights[i], torch.empty_like(x[i])) for i in range(LAYERS)]


def floor_us(layers: list[Layer], bandwidth: float, rate: float) -> tuple[float, float]:
    """Microseconds a layer can't be faster than, and the mean number of experts touched."""
    tokens = layers[0][0].shape[0]
    touched = sum(len(logits.topk(TOP_K).indices.unique()) for _, logits, *_ in layers) / len(layers)
    num_bytes = touched * 3 * HIDDEN * INNER * DTYPE.itemsize
    return max(num_bytes / bandwidth, 6 * tokens * TOP_K * HIDDEN * INNER / rate) * 1e6, touched


def by_torch(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, _: torch.Tensor) -> None:
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(TOP_K)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        out.index_add_(0, token, ((torch.nn.functional.silu(gate) * up) @ down[expert].T) * weights[token, place, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,32,128,256,1024,4096,16384")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so many (default: 600)")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/moe.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_moe.py measures Triton kernels: torch sees no NVIDIA GPU")
    began = time.perf_counter()
    bandwidth, rate = memory_bandwidth("cuda"), product_rate(DTYPE, 8192)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    weights = [
        (
            torch.randn(EXPERTS, 2 * INNER, HIDDEN, dtype=DTYPE, device="cuda").mul_(HIDDEN**-0.5),
            torch.randn(EXPERTS, HIDDEN, INNER, dtype=DTYPE, device="cuda").mul_(INNER**-0.5),
        )
        for _ in range(LAYERS)
    ]
    record: dict[str, Any] = {"benchmark": "moe", **environment("cuda"), "bandwidth": bandwidth, "rows": []}
    for tokens in map(int, args.tokens.split(",")):
        layers = make_layers(tokens, weights)
        floor, touched = floor_us(layers, bandwidth, rate)
        print(f"{tokens} tokens: {touched:.0f} experts touched, floor {floor:.1f} µs a layer")
        chosen = choose_tile(tokens * TOP_K, EXPERTS, DTYPE)
        for tile in dict.fromkeys((chosen, *TILES.values(), LARGE, *MORE)):
            if time.perf_counter() - began > args.seconds:
                print("  out of time")
                break
            calls = [lambda a=a, t=tile: triton_v1.run(*a, TOP_K, True, tile=t) for a in layers]
            try:
                us = spread(replay_us(calls, samples=7))
            except Exception as e:
                print(f"  {tile}: {type(e).__name__}")  # too much shared memory, for one
                continue
            name = "chosen" if tile == chosen else ""
            print(f"  {us['median']:9.1f} µs {floor / us['median']:5.0%}  {tile} {name}", flush=True)
            row = {"tokens": tokens, "touched": touched, "floor_us": floor, "us": us, "chosen": tile == chosen}
            record["rows"].append(row | {"tile": [tile.rows, tile.columns, tile.depth, tile.warps, tile.stages]})
        us = spread([t * 1e6 for t in time_call(lambda a=layers[0]: by_torch(*a), "cuda", 5)])
        print(f"  {us['median']:9.1f} µs {floor / us['median']:5.0%}  torch, expert by expert")
        record["rows"].append({"tokens": tokens, "floor_us": floor, "us": us, "tile": None})
    if not args.no_save:
        append_line("moe.jsonl", record)


if __name__ == "__main__":
    main()
