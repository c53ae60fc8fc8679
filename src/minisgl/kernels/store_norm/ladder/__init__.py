"""Store and the next RMS norm: one launch, and the two that the engine makes."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import CTYPES, ID_CTYPES, Build, Capability, prepare
from minisgl.kernels.rmsnorm.op import add_rmsnorm, floats_only
from minisgl.kernels.spec import Run, Shape, Version
from minisgl.kernels.store.op import check_arguments, store
from minisgl.kernels.tuning import Config
from minisgl.types import KernelError

THREADS = 128
MOST_BYTES = 16 * 8 * THREADS  # of a row, that a block keeps in registers


def _build(dtype: torch.dtype, width: int, row_bytes: int, id_bytes: int) -> Build:
    macros: dict[str, str | int] = {"WIDTH": width, "ROW_BYTES": row_bytes, "THREADS": THREADS}
    types = {"DTYPE": CTYPES[dtype], "ID_T": ID_CTYPES[id_bytes]}
    return Build.of("store_norm/ladder/store_norm.cu", "store_norm", **macros, **types)


def fused(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """`store(k_cache, v_cache, k, v, slots)` and `add_rmsnorm(x, residual, weight, eps, out)` in one launch.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device, or not made of whole 16-byte vectors.
    """
    check_arguments(k_cache, v_cache, k, v, slots)
    matrices = {"x": x, "residual": residual, "out": out}
    for name, y in matrices.items():
        check.shape(name, y, (slots.shape[0], weight.shape[0]))
        check.dtype(name, y, (k.dtype,))
        check.rows(name, y)
    check.contiguous("weight", weight)
    device = check.cuda(k_cache=k_cache, v_cache=v_cache, k=k, v=v, slots=slots, weight=weight, **matrices)
    if not slots.numel():
        return
    size, row_bytes = k.element_size(), k.shape[1] * k.shape[2] * k.element_size()
    tensors = (k_cache, v_cache, k, v, x, residual, out)
    places = [y.stride(0) * size for y in tensors] + [y.data_ptr() for y in (*tensors, weight)]
    if check.vector_bytes(*places, row_bytes, weight.nbytes) != 16:
        raise KernelError("fused doesn't fit: addresses, strides and rows must be multiples of 16 bytes")
    build = _build(k.dtype, weight.shape[0], row_bytes, slots.element_size())
    start = prepare(build, device, slots.shape[0], THREADS, pdl=True)
    rows = [place for y in tensors[:4] for place in (y.data_ptr(), y.stride(0) * size)]
    start(
        *rows, slots.data_ptr(), k_cache.shape[0], x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0),
        weight.data_ptr(), eps, out.data_ptr(), out.stride(0),
    )  # fmt: skip


def separate(*args: Tensor | float) -> None:
    """The same in the engine's two launches."""
    store(*args[:5])  # type: ignore[arg-type]
    add_rmsnorm(*args[5:])  # type: ignore[arg-type]


def _fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    widest = max(shape["width"] * dtype.itemsize, 2 * shape["heads"] * shape["head_dim"] * dtype.itemsize)
    if widest > MOST_BYTES:
        return f"rows of {widest} bytes are too wide for the registers of a block; expected {MOST_BYTES} at most"
    return floats_only(where, dtype, shape)


def _no_launch(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    raise KernelError("store_norm is called by its own functions")


VERSIONS = (
    Version("separate", "cuda", floats_only, _no_launch, fixed=True),
    Version(
        "fused",
        "cuda",
        _fits,
        _no_launch,
        (_build(torch.bfloat16, 1024, 2048, 8), _build(torch.float32, 576, 768, 4), _build(torch.float16, 80, 32, 8)),
        fixed=True,
    ),
)
