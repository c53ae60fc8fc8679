"""Tile sizes of the Triton attention kernels: measured on an H100, else what fits any GPU.

What lost there, with 16-bit elements and heads of 128. Decode: 128 tokens a tile by 30% and more (one program holds too
much shared memory); one warp by 5% at small batches. Prefill: two stages by 20%; 64 rows by up to 10% (keys are read
from the L2 cache twice as often); 4 warps for 128 x 64 by 100% (spills); 128 tokens a tile by 15%. Capping registers
at 128 for 128 x 32 gains 4% without a prefix and loses 16% over one. At many short prompts 64 x 32 takes 7 to 13% less
time; at 8 of 2,048 it takes 3 to 8% more, over a prefix of 6,000 20 to 65% more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at a time, and how."""

    rows: int  # of queries in prefill: tokens × the heads of a group
    tokens: int  # of keys and values
    warps: int
    stages: int  # of the software pipeline: tiles on their way


# By head_dim rounded up to a power of two; 16-bit queries.
_DECODE = {64: Tile(16, 64, 4, 3), 128: Tile(16, 32, 2, 4), 256: Tile(16, 32, 4, 2)}
_SPLIT = {**_DECODE, 128: Tile(16, 32, 2, 3)}
_FP8 = {**_DECODE, 128: Tile(16, 64, 4, 3)}  # of the cache, at any number of sequences
_PREFILL = {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)}
_SHORT_PREFILL = {**_PREFILL, 128: Tile(64, 32, 4, 3)}
_HOPPER_SHARED = 220 << 10  # bytes a program; earlier and smaller GPUs have 99 to 163 kB
_SMALL = Tile(16, 16, 4, 2)
_MANY, _SHORT = 8192, 1024  # tokens: of a step, and on average of a prompt with what comes before it


def decode_tile(dim_pad: int, dtype: torch.dtype, cache: torch.dtype, split: bool) -> Tile:
    """The tile for decode at `dim_pad` elements a head of `dtype`, of `cache` in the pool, sequences split or not."""
    if dtype == torch.float32:  # no matrix units: operands lie in registers
        return Tile(16, 32, 4, 2) if dim_pad <= 64 else _SMALL
    return (_FP8 if cache == torch.float8_e4m3fn else _SPLIT if split else _DECODE).get(max(dim_pad, 64), _SMALL)


def many_short(num_tokens: int, lens: np.ndarray) -> bool:
    """Whether a step's `num_tokens` of prompts, which end sequences of `lens`, are of many short ones.

    lens: [S]; [0] where a graph captures the step: it has to serve prompts of any length.
    """
    return num_tokens > _MANY and int(lens.sum()) < _SHORT * len(lens)


def prefill_tile(dim_pad: int, dtype: torch.dtype, shared_bytes: int, short: bool = False) -> Tile:
    """The tile for prefill at `dim_pad` elements a head, where a program can have `shared_bytes` of shared memory.

    short: the step has many short prompts, over a 16-bit cache.
    """
    if dtype == torch.float32:
        return Tile(16, 32, 4, 2) if dim_pad <= 64 else _SMALL
    if shared_bytes < _HOPPER_SHARED and dim_pad <= 256:
        return Tile(64, 32, 4, 2)
    return (_SHORT_PREFILL if short else _PREFILL).get(max(dim_pad, 64), _SMALL)
