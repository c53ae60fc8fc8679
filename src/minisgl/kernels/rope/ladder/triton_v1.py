"""rope v1 in Triton: one program a token and head, queries and keys in one launch.

Idea: what a compiler gives for fifteen lines; the measure that the CUDA version has to beat.
Measured (H100, 16 + 8 heads of 128, µs at 1 / 64 / 1024 / 16384 tokens): 1.42 / 2.24 / 16.2 / 240, v2 in CUDA 1.13 /
1.70 / 5.82 / 71.5: a program for each head fetches its token's angles again, and moves 64 pairs at a time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope(q, q_stride, k, k_stride, cos_sin, positions, NUM_Q: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    mask = pair < DIM // 2
    angle = cos_sin + tl.load(positions + token).to(tl.int64) * DIM + pair
    cos = tl.load(angle, mask=mask)
    sin = tl.load(angle + DIM // 2, mask=mask)
    if head < NUM_Q:
        place = q + token * q_stride + head * DIM + pair
    else:
        place = k + token * k_stride + (head - NUM_Q) * DIM + pair
    a = tl.load(place, mask=mask)
    b = tl.load(place + DIM // 2, mask=mask)
    tl.store(place, (a.to(tl.float32) * cos - b.to(tl.float32) * sin).to(a.dtype), mask=mask)
    tl.store(place + DIM // 2, (b.to(tl.float32) * cos + a.to(tl.float32) * sin).to(a.dtype), mask=mask)


def run(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """As `rope`."""
    tokens, heads, dim = q.shape
    block = triton.next_power_of_2(dim // 2)
    _rope[(tokens, heads + k.shape[1])](
        q, q.stride(0), k, k.stride(0), cos_sin, positions, NUM_Q=heads, DIM=dim, BLOCK=block, num_warps=1
    )
