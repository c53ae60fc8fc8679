"""Tile sizes of the Triton attention kernels: measured on an H100, else what fits any GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at a time, and how."""

    rows: int  # of queries in prefill: tokens × the heads of a group
    tokens: int  # of keys and values
    warps: int
    stages: int  # of the software pipeline: tiles on their way


LARGE = 160 << 10  # shared memory of the GPUs for data centres from 2020 on; others have 100 kB or less

# By head_dim rounded up to a power of two; 16-bit elements.
_DECODE = {64: Tile(16, 32, 2, 3), 128: Tile(16, 32, 2, 3), 256: Tile(16, 32, 4, 3)}
_PREFILL = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2)}


def decode_tile(dim_pad: int, dtype: torch.dtype) -> Tile:
    """The tile for decode at `dim_pad` elements a head."""
    if dtype == torch.float32:  # without matrix units, operands lie in registers
        return Tile(16, 32 if dim_pad <= 64 else 16, 4, 2)
    return _DECODE.get(dim_pad) or (_DECODE[64] if dim_pad < 64 else Tile(16, 16, 4, 2))


def prefill_tile(dim_pad: int, dtype: torch.dtype, shared_bytes: int) -> Tile:
    """The tile for prefill at `dim_pad` elements a head, where a program can have `shared_bytes` of shared memory."""
    if dtype == torch.float32:
        return Tile(16, 32 if dim_pad <= 64 else 16, 4, 2)
    if shared_bytes < LARGE and dim_pad <= 256:
        return Tile(64, 32, 4, 2)
    return _PREFILL.get(dim_pad) or (_PREFILL[64] if dim_pad < 64 else Tile(16, 16, 4, 2))
