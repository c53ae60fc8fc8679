"""Checks of kernel arguments. They run on every call, so the good case costs a fraction of a microsecond."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minisgl.types import KernelError

IDS = (torch.int32, torch.int64)


def dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if x.dtype not in allowed:
        raise KernelError(f"{name} is {x.dtype}; expected {' or '.join(map(str, allowed))}")


def shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise KernelError(f"{name} has shape {tuple(x.shape)}; expected {expected}")


def dims(name: str, x: Tensor, number: int, form: str) -> None:
    if x.dim() != number:
        raise KernelError(f"{name} has shape {tuple(x.shape)}; expected {form}")


def rows(name: str, x: Tensor) -> None:
    """Everything behind the first dimension of `x` must be contiguous; rows may lie apart from one another."""
    if x.is_contiguous():
        return
    sizes, strides, step = x.shape, x.stride(), 1
    for i in range(len(sizes) - 1, 0, -1):
        if strides[i] != step and sizes[i] != 1:
            raise KernelError(f"{name} has strides {strides}: its rows must be contiguous; call .contiguous()")
        step *= sizes[i]


def contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise KernelError(f"{name} has strides {x.stride()}; expected a contiguous tensor")


def cuda(**tensors: Tensor) -> int:
    """Number of the CUDA device that all of `tensors` are on; the first is what the others must match."""
    names = iter(tensors.items())
    first, x = next(names)
    device = x.get_device()
    if not x.is_cuda:
        raise KernelError(f"{first} is on {x.device}; expected a CUDA device")
    for name, y in names:
        if y.get_device() != device:
            raise KernelError(f"{name} is on {y.device}, {first} on {x.device}; expected one device for all")
    return device


def aligned(name: str, x: Tensor, num_bytes: int) -> None:
    """Address and (of more than one dimension) row stride of `x` must be multiples of `num_bytes`."""
    stride = x.stride(0) * x.element_size() if x.dim() > 1 else 0
    if (x.data_ptr() | stride) % num_bytes:
        raise KernelError(f"{name} must start at a multiple of {num_bytes} bytes, and so must its rows")


def vector_bytes(*places: int) -> int:
    """The widest vector, at most 16 bytes, that addresses, strides and sizes in bytes are all multiples of."""
    merged = 16
    for place in places:
        merged |= place
    return merged & -merged


def num_blocks(threads_in_all: int, threads: int) -> int:
    """Blocks that make `threads_in_all` threads; kernels number threads with 32 bits.

    Raises:
        KernelError: more than that.
    """
    if threads_in_all >= 1 << 32:
        raise KernelError("the tensors have too many elements for one launch; split the call along its first dimension")
    return -(-threads_in_all // threads)


def split_row(vectors: int, work: int) -> tuple[int, int, int]:
    """How lanes share a row: (lanes of a group, vectors a lane, pieces a row), `work` vectors a lane at most."""
    lanes = min(32, 1 << (vectors - 1).bit_length())
    work = min(work, -(-vectors // lanes))
    return lanes, work, -(-vectors // (lanes * work))
