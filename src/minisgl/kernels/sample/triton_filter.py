"""filter in Triton, without a sort: a program finds a row's threshold, two bits of it a pass.

Idea: logits as integers in the same order; the threshold is the largest such key for which the tokens at or above it
count k, or weigh p. 16-bit logits need eight passes over the row (which stays in the L2 cache), float32 sixteen; a
sort moves keys and ids through memory several times. Rows without a filter cost nothing.
Measured (H100, decode steps of Qwen3-0.6B, batch 256): 8.5 ms without a filter, 10.2 with top-k, 10.6 with top-p, 11.5
with all three.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.kernels.sample.filter import ONE

BLOCK, WARPS = 4096, 16
_ONE = tl.constexpr(ONE)
_UNUSED_BITS = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}  # of a float32 that holds one; even


@triton.jit
def _read(logits, place, vocab, best, t, LOW: tl.constexpr):
    """Keys that are ordered as the logits are, and weights; a weight of -1 marks what lies behind the row's end."""
    x = tl.load(logits + place, mask=place < vocab, other=float("-inf")).to(tl.float32) + 0.0  # no -0.0
    bits = x.to(tl.int32, bitcast=True)
    weight = (tl.exp((x - best) / t) * _ONE).to(tl.int64)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> LOW, tl.where(place < vocab, weight, -1)


@triton.jit
def _reach(logits, vocab, best, t, target, WEIGH: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key for which the tokens at or above it count, or weigh, `target`."""
    key = tl.full([], -(1 << (31 - LOW)), tl.int32)
    for step in range(16 - LOW // 2):
        shift = 30 - LOW - 2 * step
        first, second, third = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
        for start in range(0, vocab, BLOCK):
            keys, weight = _read(logits, start + tl.arange(0, BLOCK), vocab, best, t, LOW)
            amount = tl.maximum(weight, 0) if WEIGH else (weight >= 0).to(tl.int64)
            first += tl.where(keys >= key + (1 << shift), amount, 0)
            second += tl.where(keys >= key + (2 << shift), amount, 0)
            third += tl.where(keys >= key + (3 << shift), amount, 0)
        digit = (tl.sum(first) >= target).to(tl.int32)
        digit += (tl.sum(second) >= target).to(tl.int32) + (tl.sum(third) >= target).to(tl.int32)
        key += digit << shift
    return key


@triton.jit
def _above(logits, vocab, best, t, key, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens lie above `key`, what they weigh, and what one at `key` weighs."""
    count, total, one = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        keys, weight = _read(logits, start + tl.arange(0, BLOCK), vocab, best, t, LOW)
        above = (keys > key) & (weight >= 0)
        count += above.to(tl.int64)
        total += tl.where(above, weight, 0)
        one = tl.maximum(one, tl.where(keys == key, weight, 0))
    return tl.sum(count), tl.sum(total), tl.max(one)


@triton.jit(do_not_specialize=["stride", "vocab", "param_stride"])
def _filter(
    logits, stride, vocab, temperature, top_k, top_p, min_p, param_stride, LOW: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = row * param_stride
    t, k, p, least = tl.load(temperature + at), tl.load(top_k + at), tl.load(top_p + at), tl.load(min_p + at)
    if (t == 0) | ((k <= 0) & (p >= 1) & (least <= 0)):
        return
    logits += row * stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < vocab, other=float("-inf"))
        largest = tl.maximum(largest, x.to(tl.float32))
    best = tl.max(largest)
    key = tl.full([], -(1 << (31 - LOW)), tl.int32)
    ties = vocab.to(tl.int64)  # that are kept of the tokens at `key`
    if (k > 0) & (k < vocab):
        key = _reach(logits, vocab, best, t, k, False, LOW, BLOCK)
        count, total, one = _above(logits, vocab, best, t, key, LOW, BLOCK)
        ties = k - count
    if p < 1:
        count, total, one = _above(logits, vocab, best, t, key, LOW, BLOCK)
        total += ties * one
        target = tl.maximum(tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
        key = _reach(logits, vocab, best, t, target, True, LOW, BLOCK)
        count, total, one = _above(logits, vocab, best, t, key, LOW, BLOCK)
        ties = (target - total + one - 1) // one
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        keys, _weight = _read(logits, place, vocab, best, t, LOW)
        x = tl.load(logits + place, mask=place < vocab, other=0.0).to(tl.float32)
        tied = (keys == key).to(tl.int64)
        kept = (keys > key) | ((tied > 0) & (tl.cumsum(tied, 0) <= ties))
        kept = kept & ~(tl.exp((x - best) / t) < least)
        tl.store(logits + place, float("-inf"), mask=(place < vocab) & ~kept)
        ties -= tl.sum(tied)


def run(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """As `filter_logits`."""
    stride, low = temperature.stride(0), _UNUSED_BITS[logits.dtype]
    _filter[(logits.shape[0],)](
        logits, logits.stride(0), logits.shape[1], temperature, top_k, top_p, min_p, stride, LOW=low, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
