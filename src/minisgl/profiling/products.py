"""The matrix products of a decode step: cuBLAS beside every configuration of skinny_gemm, and the table of the best."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minisgl.hardware import detect
from minisgl.kernels.rmsnorm.op import add_rmsnorm
from minisgl.kernels.silu_mul.op import silu_mul
from minisgl.kernels.skinny_gemm.cases import SPEC, case
from minisgl.kernels.skinny_gemm.ladder import tiling_v2, triton_v1
from minisgl.kernels.skinny_gemm.op import KERNEL, product_name, skinny_gemm, tiling
from minisgl.kernels.spec import Shape
from minisgl.kernels.tuning import Config, batch_bucket
from minisgl.profiling.clock import spread
from minisgl.profiling.replay import replay_us
from minisgl.profiling.shapes import SHAPES
from minisgl.types import KernelError

MODELS = (
    "qwen3-0.6b", "qwen3-8b", "qwen3-4b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "qwen3-14b", "qwen3-30b-a3b",
    "smollm2",
)  # fmt: skip
BATCHES = (1, 8, 16, 32, 64)  # each the largest of its bucket
DTYPE = torch.bfloat16
ENGINE = KERNEL.versions[0].name  # the version that the engine runs
TILINGS = {"v3": tiling, "v3 close": tiling, "v2": tiling_v2}


def products(model: str, batch: int) -> Iterator[tuple[str, Shape]]:
    """Name and shape of each product of a layer, and of the LM head; experts have kernels of their own."""
    config = SHAPES[model]
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim", hidden // heads)
    qkv = (heads + 2 * config["num_key_value_heads"]) * dim
    if "num_experts" not in config:
        yield "gate_up", case(batch, 2 * inner, hidden, norm=1, gated=1)
        yield "down", case(batch, hidden, inner, add=1)
    yield "qkv", case(batch, qkv, hidden, norm=1)
    yield "o", case(batch, hidden, heads * dim, add=1)
    yield "head", case(batch, config["vocab_size"], hidden)


def engine_call(x: Tensor, weight: Tensor, out: Tensor, norm: Tensor | None, eps: float, gated: bool, _: bool) -> None:
    """As the engine does without skinny_gemm; there the residual's addition is part of the next norm, here of this."""
    if norm is not None:
        normed = torch.empty_like(x)
        add_rmsnorm(x, _residual_of(x), norm, eps, normed)
        x = normed
    y = F.linear(x, weight)
    if gated:
        silu_mul(y, out)


_residuals: dict[torch.Size, Tensor] = {}


def _residual_of(x: Tensor) -> Tensor:
    if x.shape not in _residuals:  # at the first call, which no graph captures
        _residuals[x.shape] = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return _residuals[x.shape]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do a product: `version` and `config` of skinny_gemm, or neither."""

    name: str
    calls: list[Callable[[], object]]  # one for each set of arguments
    version: str | None = None
    config: Config | None = None


def variants(shape: Shape, inputs: list[tuple[Any, ...]], ladder: bool) -> Iterator[Variant]:
    def calls(run: Callable[..., object], **options: object) -> list[Callable[[], object]]:
        return [partial(run, *args, **options) for args in inputs]

    yield Variant("cublas", [partial(F.linear, x, weight) for x, weight, *_ in inputs])
    yield Variant("engine", calls(engine_call))
    for version, tile in TILINGS.items() if ladder else [(ENGINE, TILINGS[ENGINE])]:
        seen = set()
        for config in SPEC.configs:
            if (tiles := tile(shape, config)) not in seen:
                seen.add(tiles)
                name = "{} {} warps, {} groups of rows, depth {}".format(version, *tiles)
                yield Variant(name, calls(skinny_gemm, version=version, config=config), version, config)
    if not ladder:
        return

    for columns in (16, 32):
        yield Variant(f"v1 {columns} columns", calls(triton_v1.run, columns=columns), "v1")


def bench_product(shape: Shape, bandwidth: float, ladder: bool = False) -> list[dict[str, Any]]:
    """A row a variant, the fastest first: microseconds a call, and the part of `bandwidth` that the weights take.

    ladder: versions that the engine doesn't run as well.
    """
    cuda = detect().cuda
    assert cuda is not None
    num_bytes = shape["n"] * shape["k"] * DTYPE.itemsize
    copies = max(-(-3 * cuda.l2_bytes // num_bytes), 2)
    inputs = SPEC.inputs(shape, DTYPE, torch.device("cuda"), torch.Generator("cuda").manual_seed(0), copies)
    inputs = [(inputs[0][0], a[1], inputs[0][2], *a[3:]) for a in inputs]  # x and out warm, as in a model
    rows = []
    for variant in variants(shape, inputs, ladder):
        try:
            us = spread(replay_us(variant.calls, samples=7))
        except KernelError as e:
            print(f"    {variant.name}: {str(e).splitlines()[0]}")
            continue
        row = {"variant": variant.name, "us": us, "fraction": num_bytes / bandwidth * 1e6 / us["median"]}
        config = variant.config and [variant.config.threads, variant.config.work]
        rows.append(row | {"version": variant.version, "config": config})
    return sorted(rows, key=lambda row: row["us"]["median"])


def entries(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """What a tuning table holds of measured products: configurations by product and bucket of the batch.

    Left out, and so cuBLAS's: where the best of ours isn't faster by more than both measurements scatter (p10 to p90),
    and batches that aren't the largest of their bucket. Of a product measured twice the later row counts.
    """
    table: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        (engine,) = (v for v in row["variants"] if v["variant"] == "engine")
        ours = [v for v in row["variants"] if v["version"] == ENGINE]
        best = min(ours, key=lambda v: v["us"]["median"], default=engine)
        buckets = table.setdefault(row_name(row), {})
        buckets.pop(str(row["tokens"]), None)
        if batch_bucket(row["tokens"]) == row["tokens"] and best["us"]["p90"] < engine["us"]["p10"]:
            buckets[str(row["tokens"])] = best["config"]
    return {name: buckets for name, buckets in table.items() if buckets}


def row_name(row: dict[str, Any]) -> str:
    return product_name(row["n"], row["k"], row["norm"], row["gated"], row["add"])


def rows_of(record: Path) -> Iterator[dict[str, Any]]:
    """The rows of all lines that benchmarks/bench_gemm.py appended to `record`."""
    for line in record.read_text(encoding="utf-8").splitlines():
        yield from json.loads(line)["rows"]
