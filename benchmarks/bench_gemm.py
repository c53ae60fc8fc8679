"""The matrix products of a decode step: cuBLAS beside every variant of skinny_gemm, for known models and batches.

    python benchmarks/bench_gemm.py [--models qwen3-0.6b,qwen3-8b] [--batches 1,8] [--seconds 240] [--no-save]

Microseconds a call from the replay of a CUDA graph over weights in rotation that exceed the L2 cache three times, as in
a model; x and out are warm. `engine` is what the engine launches today for the same work: the norm's kernel where one
lies before, cuBLAS, SiLU·mul behind gate/up. `cublas` is the product alone. The fraction is that of the weights' bytes
over the measured copy bandwidth. Batches come in the order given, of each the models in theirs, so that a run that
`--seconds` cuts short has what matters most; what it left out is in the record.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import append_line, environment, memory_bandwidth, spread
from torch import Tensor
from torch.nn import functional as F

from minisgl.hardware import detect
from minisgl.kernels.rmsnorm.op import add_rmsnorm
from minisgl.kernels.silu_mul.op import silu_mul
from minisgl.kernels.skinny_gemm.cases import ADD_SPEC, SPEC, case
from minisgl.kernels.skinny_gemm.ladder import skinny_gemm, tiling, triton_v1
from minisgl.kernels.spec import Shape
from minisgl.profiling.replay import replay_us
from minisgl.profiling.shapes import SHAPES
from minisgl.types import KernelError

MODELS = ("qwen3-0.6b", "qwen3-8b", "qwen3-4b", "llama-3.2-1b", "llama-3.2-3b", "qwen3-14b", "smollm2")
BATCHES = (1, 8, 32, 2, 4, 16, 64)
DTYPE = torch.bfloat16
Calls = list[Callable[[], object]]


def products(model: str, batch: int) -> Iterator[tuple[str, bool, Shape]]:
    """Name, whether it is added to the residual stream, and shape of each product of a layer, and of the LM head."""
    config = SHAPES[model]
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim", hidden // heads)
    qkv = (heads + 2 * config["num_key_value_heads"]) * dim
    yield "gate_up", False, case(batch, 2 * inner, hidden, 1, 1)
    yield "down", True, case(batch, hidden, inner)
    yield "qkv", False, case(batch, qkv, hidden, 1)
    yield "o", True, case(batch, hidden, heads * dim)
    yield "head", False, case(batch, config["vocab_size"], hidden)


def engine_call(x: Tensor, weight: Tensor, out: Tensor, norm: Tensor | None, eps: float, gated: bool, _: bool) -> None:
    """The residual's addition belongs to the next norm there; here to this one."""
    if norm is not None:
        normed = torch.empty_like(x)
        add_rmsnorm(x, residual_of(x), norm, eps, normed)
        x = normed
    y = F.linear(x, weight)
    if gated:
        silu_mul(y, out)


_residuals: dict[torch.Size, Tensor] = {}


def residual_of(x: Tensor) -> Tensor:
    if x.shape not in _residuals:  # at the first call, which no graph captures
        _residuals[x.shape] = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return _residuals[x.shape]


def variants(add: bool, shape: Shape, inputs: list[tuple[Any, ...]]) -> Iterator[tuple[str, list[int] | None, Calls]]:
    """Names, configurations of ours, and a call for each set of arguments."""
    yield "cublas", None, [lambda a=a: F.linear(a[0], a[1]) for a in inputs]
    yield "engine", None, [lambda a=a: engine_call(*a) for a in inputs]
    seen = set()
    for config in (ADD_SPEC if add else SPEC).configs:
        if (tiles := tiling(shape, config)) not in seen:
            seen.add(tiles)
            name = "v2 {} warps, {} tiles, depth {}".format(*tiles)
            yield (
                name,
                [config.threads, config.work],
                [lambda a=a, c=config: skinny_gemm(*a, version="v2", config=c) for a in inputs],
            )
    for columns in (16, 32):
        yield f"v1 {columns} columns", None, [lambda a=a, c=columns: triton_v1.run(*a, columns=c) for a in inputs]


def measure(name: str, calls: Calls, num_bytes: int, bandwidth: float) -> dict[str, Any] | None:
    try:
        us = spread(replay_us(calls, samples=7))
    except KernelError as e:
        print(f"    {name}: {str(e).splitlines()[0]}")
        return None
    return {"variant": name, "us": us, "fraction": num_bytes / bandwidth * 1e6 / us["median"]}


def bench_product(add: bool, shape: Shape, bandwidth: float) -> list[dict[str, Any]]:
    """A row a variant, the fastest first."""
    spec, cuda = ADD_SPEC if add else SPEC, detect().cuda
    assert cuda is not None
    num_bytes = shape["n"] * shape["k"] * DTYPE.itemsize
    copies = max(-(-3 * cuda.l2_bytes // num_bytes), 2)
    inputs = spec.inputs(shape, DTYPE, torch.device("cuda"), torch.Generator("cuda").manual_seed(0), copies)
    inputs = [(inputs[0][0], a[1], inputs[0][2], *a[3:]) for a in inputs]  # x and out warm, as in a model
    rows = []
    for name, config, calls in variants(add, shape, inputs):
        row = measure(name, calls, num_bytes, bandwidth)
        rows += [row | {"config": config}] if row else []
    return sorted(rows, key=lambda row: row["us"]["median"])


def show(where: str, rows: list[dict[str, Any]]) -> None:
    times = {row["variant"]: row["us"]["median"] for row in rows}
    best = rows[0]
    ours = next((row for row in rows if row["variant"].startswith("v")), best)
    print(
        f"{where:36} cublas {times['cublas']:8.2f} µs  engine {times['engine']:8.2f}  "
        f"ours {ours['us']['median']:8.2f} {ours['fraction']:5.0%} ({ours['variant']})"
        f"{'' if best is ours else '  best: ' + best['variant']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--products", default="gate_up,down,qkv,o,head")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so many (default: 600)")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/gemm.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gemm.py measures CUDA kernels: torch sees no NVIDIA GPU")
    bandwidth, began = memory_bandwidth("cuda"), time.perf_counter()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    record: dict[str, Any] = {"benchmark": "gemm", **environment("cuda"), "bandwidth": bandwidth, "rows": []}
    left_out = []
    for batch in map(int, args.batches.split(",")):
        for model in args.models.split(","):
            for name, add, shape in products(model, batch):
                if name not in args.products.split(","):
                    continue
                where = f"{model} {name} {shape['n']}x{shape['k']} batch {batch}"
                if time.perf_counter() - began > args.seconds:
                    left_out.append(where)
                    continue
                rows = bench_product(add, shape, bandwidth)
                show(where, rows)
                record["rows"].append({"model": model, "product": name, **shape, "variants": rows})
                torch.cuda.empty_cache()
    print(f"{len(left_out)} products left out")
    if not args.no_save:
        append_line("gemm.jsonl", record | {"left_out": left_out})


if __name__ == "__main__":
    main()
