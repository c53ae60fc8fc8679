"""moe v1 in Triton: route, two grouped products, weighted sum.

Idea: nothing asks the host. A token goes to an expert at most once, so each expert has a list of T places; routing
counts its tokens with atomics. A grouped product is launched for as many tiles as there can be, whatever the routing;
each finds its expert from the counts, and those left over end at once. Columns run fastest over the grid, so that an
expert's weights stay in the L2 cache while its tiles are computed. A list's order is chance, but no row's value depends
on the others of its tile: results don't vary.

Programmatic dependent launch: every kernel waits before it touches anything another one writes.

Measured (H100, a layer of Qwen3-30B-A3B, µs at 1 / 32 / 256 / 4096 tokens): 38.1 / 344 / 431 / 907; the floor of bytes
and arithmetic is 25.7 / 341 / 411 / 417.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program of a grouped product computes, and how."""

    rows: int  # tokens
    columns: int
    depth: int  # of the sum, at a time
    warps: int
    stages: int


# By tokens an expert, up to: 16-bit elements.
TILES = {16: Tile(16, 32, 128, 4, 4), 48: Tile(32, 64, 64, 4, 4), 96: Tile(64, 64, 64, 4, 4)}
LARGE, PRECISE = Tile(128, 64, 64, 8, 3), Tile(16, 32, 32, 4, 2)


def choose_tile(pairs: int, experts: int, dtype: torch.dtype) -> Tile:
    """The tile for `pairs` of a token and an expert of its."""
    if dtype == torch.float32:  # no matrix units: operands lie in registers
        return PRECISE
    return next((tile for most, tile in TILES.items() if pairs <= most * experts), LARGE)


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits, stride, weights, counts, order, num_tokens,
    TOP_K: tl.constexpr, K_PAD: tl.constexpr, EXPERTS: tl.constexpr, E_PAD: tl.constexpr, NORMALISE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    _wait(PDL)
    token = tl.program_id(0)
    expert, place = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    score = tl.load(logits + token.to(tl.int64) * stride + expert, mask=expert < EXPERTS, other=float("-inf"))
    score = tl.exp(score.to(tl.float32) - tl.max(score.to(tl.float32), 0))
    left = tl.where(expert < EXPERTS, score / tl.sum(score, 0), -1.0)
    weight, chosen = tl.zeros([K_PAD], tl.float32), tl.zeros([K_PAD], tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.argmax(left, 0)
        weight = tl.where(place == j, tl.max(left, 0), weight)
        chosen = tl.where(place == j, best, chosen)
        left = tl.where(expert == best, -1.0, left)
    if NORMALISE:
        weight = weight / tl.sum(weight, 0)
    pair = token * TOP_K + place
    tl.store(weights + pair, weight, mask=place < TOP_K)
    rank = tl.atomic_add(counts + chosen, 1, mask=place < TOP_K)
    tl.store(order + chosen.to(tl.int64) * num_tokens + rank, pair, mask=place < TOP_K)


@triton.jit(do_not_specialize=["num_tokens"])
def _product(
    x, x_stride, matrices, out, counts, order, num_tokens, width, depth,
    SHARED: tl.constexpr, GATED: tl.constexpr, EXPERTS: tl.constexpr, E_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[pair] = matrices[expert of pair] · x[pair // SHARED], or with GATED silu of that · (rows `width` on) · x."""
    _wait(PDL)
    each = tl.arange(0, E_PAD)
    count = tl.load(counts + each, mask=each < EXPERTS, other=0)
    tiles = (count + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tl.program_id(1)).to(tl.int32), 0)
    begin = (tl.program_id(1) - tl.sum(tl.where(each < expert, tiles, 0), 0)) * ROWS
    count = tl.sum(tl.where(each == expert, count, 0), 0)
    if begin >= count:
        return
    row = begin + tl.arange(0, ROWS)
    pair = tl.load(order + expert.to(tl.int64) * num_tokens + row, mask=row < count, other=0).to(tl.int64)
    column, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    first = expert.to(tl.int64) * (width * (2 if GATED else 1))
    left = x + (pair // SHARED)[:, None] * x_stride + k[None, :]
    right = matrices + (first + column)[None, :] * depth + k[:, None]
    acc, up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, depth, DEPTH):
        deep = start + k < depth
        a = tl.load(left + start, mask=(row < count)[:, None] & deep[None, :], other=0.0)
        inside = (column < width)[None, :] & deep[:, None]
        acc = tl.dot(a, tl.load(right + start, mask=inside, other=0.0), acc, input_precision="ieee")
        if GATED:
            b = tl.load(right + width.to(tl.int64) * depth + start, mask=inside, other=0.0)
            up = tl.dot(a, b, up, input_precision="ieee")
    if GATED:
        acc = acc / (1 + tl.exp(-acc)) * up
    to = out + pair[:, None] * width + column[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(row < count)[:, None] & (column < width)[None, :])


@triton.jit
def _sum(
    parts, weights, out, stride, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr
):
    _wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = out + token * stride + column
    total = tl.load(to, mask=column < width, other=0.0).to(tl.float32) if ADD else tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        part = tl.load(parts + (token * TOP_K + j) * width + column, mask=column < width, other=0.0)
        total += tl.load(weights + token * TOP_K + j) * part.to(tl.float32)
    tl.store(to, total.to(out.dtype.element_ty), mask=column < width)


def run(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, top_k: int, normalise: bool,
    add: bool = False, tile: Tile | None = None,
) -> None:  # fmt: skip
    """As `moe`; `tile` fixes what programs compute, None: by the number of tokens."""
    tokens, experts, hidden, inner = x.shape[0], down.shape[0], down.shape[1], down.shape[2]
    pairs = tokens * top_k
    tile = tile or choose_tile(pairs, experts, x.dtype)
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    e_pad = triton.next_power_of_2(experts)
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    order = torch.empty(experts, tokens, dtype=torch.int32, device=x.device)
    weights = torch.empty(pairs, dtype=torch.float32, device=x.device)
    _route[(tokens,)](
        logits, logits.stride(0), weights, counts, order, tokens, TOP_K=top_k, K_PAD=triton.next_power_of_2(top_k),
        EXPERTS=experts, E_PAD=e_pad, NORMALISE=normalise, num_warps=1, **launch,
    )  # fmt: skip
    most = (pairs + min(experts, pairs) * (tile.rows - 1)) // tile.rows  # tiles, however tokens spread
    act, parts = x.new_empty(pairs, inner), x.new_empty(pairs, hidden)
    shared = {"EXPERTS": experts, "E_PAD": e_pad, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    shared |= {"num_warps": tile.warps, "num_stages": tile.stages, **launch}
    _product[triton.cdiv(inner, tile.columns), most](
        x, x.stride(0), gate_up, act, counts, order, tokens, inner, hidden, SHARED=top_k, GATED=True, **shared
    )
    _product[triton.cdiv(hidden, tile.columns), most](
        act, inner, down, parts, counts, order, tokens, hidden, inner, SHARED=1, GATED=False, **shared
    )
    block = min(triton.next_power_of_2(hidden), 1024)
    _sum[tokens, triton.cdiv(hidden, block)](
        parts, weights, out, out.stride(0), hidden, TOP_K=top_k, BLOCK=block, ADD=add, num_warps=4, **launch
    )
