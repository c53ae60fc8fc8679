"""skinny_gemm v1 in Triton: a program has COLUMNS rows of the weight and all of x, padded to 16 rows.

Idea: what the compiler gives for a plain loop; the measure that the CUDA version has to beat.
Measured (H100, one row, µs, cuBLAS / v1): Qwen3-0.6B's QKV 7.01 / 9.66, O 5.74 / 6.28, gate/up 9.13 / 11.5, down 7.04 /
8.67; of Qwen3-8B it wins the LM head alone, 436 / 409.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x, x_stride, weight, norm, eps, out, out_stride, rows, width, depth,
    GATED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inputs = x + row[:, None] * x_stride + k[None, :]
    weights = weight + column[None, :].to(tl.int64) * depth + k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, depth, DEPTH):
        deep = start + k < depth
        a = tl.load(inputs + start, mask=(row < rows)[:, None] & deep[None, :], other=0.0)
        if norm is not None:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            a = (wide * tl.load(norm + start + k, mask=deep, other=0.0).to(tl.float32)[None, :]).to(a.dtype)
        inside = deep[:, None] & (column < width)[None, :]
        acc = tl.dot(a, tl.load(weights + start, mask=inside, other=0.0), acc, input_precision="ieee")
        if GATED:
            b = tl.load(weights + width.to(tl.int64) * depth + start, mask=inside, other=0.0)
            up = tl.dot(a, b, up, input_precision="ieee")
    if norm is not None:
        factor = 1 / tl.sqrt(squares / depth + eps)
        acc, up = acc * factor[:, None], up * factor[:, None]
    if GATED:
        acc = acc / (1 + tl.exp(-acc)) * up
    place = out + row[:, None] * out_stride + column[None, :]
    wanted = (row < rows)[:, None] & (column < width)[None, :]
    if ADD:
        acc += tl.load(place, mask=wanted, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), mask=wanted)


def run(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add: bool,
    columns: int = 16,
) -> None:
    """As `skinny_gemm`; `columns` of the output a program."""
    rows, (width, depth) = x.shape[0], (out.shape[1], x.shape[1])
    deep = 32 if x.dtype == torch.float32 else 128
    _skinny[(triton.cdiv(width, columns),)](
        x, x.stride(0), weight, norm, eps, out, out.stride(0), rows, width, depth, GATED=gated, ADD=add,
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=columns, DEPTH=deep, num_warps=4, num_stages=4,
    )  # fmt: skip
