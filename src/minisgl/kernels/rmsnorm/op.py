"""rmsnorm and add_rmsnorm: root-mean-square norm of rows, alone or behind the addition to the residual stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import CTYPES, Build, Capability, prepare
from minisgl.kernels.spec import FLOATS, Kernel, Run, Shape, Version, by_layout, launcher, nothing, register
from minisgl.kernels.tuning import Config


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, *, version: str | None = None, config: Config | None = None,
) -> None:  # fmt: skip
    """out = x / sqrt(mean(x²) + eps) · weight over rows, in float32, rounded once (Zhang and Sennrich, 2019).

    Args:
        x: [T, H] float32, bfloat16 or float16; rows contiguous, but they may lie apart from one another.
        weight: [H], x's dtype.
        eps: added to the mean of squares.
        out: [T, H], x's dtype; may be x.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    _plan((x, None, weight, out), version, config)(x, None, weight, eps, out)


def add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, *, version: str | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """residual += x, then out = rmsnorm(residual) of the sum as it is stored, rounded to its dtype.

    Arguments and errors as for `rmsnorm`; `residual` [T, H] is updated in place.
    """
    _plan((x, residual, weight, out), version, config)(x, residual, weight, eps, out)


@by_layout
def _plan(tensors: tuple[Any, ...], version: str | None, config: Config | None) -> Run:
    x, residual, weight, out = tensors
    matrices = {"x": x, "out": out} | ({} if residual is None else {"residual": residual})
    check.dims("x", x, 2, "[T, H]")
    check.dtype("x", x, FLOATS)
    check.shape("weight", weight, (x.shape[1],))
    check.contiguous("weight", weight)
    check.dtype("weight", weight, (x.dtype,))
    for name, y in matrices.items():
        check.shape(name, y, (x.shape[0], x.shape[1]))
        check.dtype(name, y, (x.dtype,))
        check.rows(name, y)
    device = check.cuda(weight=weight, **matrices)
    if not x.numel():
        return nothing
    size = x.element_size()
    places = [weight.data_ptr(), x.shape[1] * size]
    for y in matrices.values():
        places += [y.data_ptr(), y.stride(0) * size]
    kernel = "rmsnorm" if residual is None else "add_rmsnorm"
    return launcher(kernel, device, x.dtype, version, config, *x.shape, check.vector_bytes(*places) // size)


def floats_only(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    """`supports` of the kernels that compute."""
    return None if dtype in CTYPES else f"expected one of {', '.join(map(str, CTYPES))}"


def _fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    if shape["width"] > 8 * 1024 * shape.get("vec", 1):
        return f"a row of {shape['width']} is too wide for one block at {shape.get('vec', 1)} elements a vector"
    return floats_only(where, dtype, shape)


def build_for(add: int, dtype: torch.dtype, width: int, vec: int, row_threads: int) -> Build:
    count = -(-width // (vec * row_threads))
    macros = {"ADD": add, "WIDTH": width, "VEC": vec, "ROW_THREADS": row_threads, "COUNT": count}
    return Build.of("rmsnorm/rmsnorm.cu", "rmsnorm", DTYPE=CTYPES[dtype], **macros)


def _row_threads(vectors: int, work: int) -> int:
    """Threads of a row with about `work` vectors each: a power of two within a warp, else whole warps."""
    wanted = min(-(-vectors // work), 1024)
    return 1 << (wanted - 1).bit_length() if wanted <= 32 else -(-wanted // 32) * 32


def _v2(add: int, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    rows, width, vec = shape["tokens"], shape["width"], shape["vec"]
    row_threads = _row_threads(width // vec, config.work)
    threads = max(row_threads, config.threads) if row_threads <= 32 else row_threads
    blocks = -(-rows // (threads // row_threads))
    start = prepare(build_for(add, dtype, width, vec, row_threads), device, blocks, threads, config.pdl)

    def run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
        other = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
        ours = x.data_ptr(), x.stride(0), *other, weight.data_ptr(), eps, out.data_ptr(), out.stride(0), rows
        start(*ours)

    return run


def _cost(add: int, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    moved = (shape["tokens"] * (2 + 2 * add) + 1) * shape["width"] * dtype.itemsize
    return moved, shape["tokens"] * shape["width"] * (4 + add)


def _kernel(name: str, add: int) -> Kernel:
    ours = Version("v2", "cuda", _fits, partial(_v2, add))
    return Kernel(name, (ours,), ("tokens", "width", "vec"), partial(_cost, add))


KERNEL, ADD_KERNEL = register(_kernel("rmsnorm", 0)), register(_kernel("add_rmsnorm", 1))
