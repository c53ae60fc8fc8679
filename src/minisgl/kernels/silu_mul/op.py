"""silu_mul: out = silu(gate) · up, where gate and up are the halves of a fused product's rows (Shazeer, 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import CTYPES, Build, prepare
from minisgl.kernels.rmsnorm.op import floats_only
from minisgl.kernels.spec import FLOATS, Kernel, Run, Shape, Version, by_layout, launcher, nothing, register
from minisgl.kernels.tuning import Config
from minisgl.types import KernelError


def silu_mul(gate_up: Tensor, out: Tensor, *, version: str | None = None, config: Config | None = None) -> None:
    """out = gate / (1 + exp(-gate)) · up, in float32, rounded once.

    Args:
        gate_up: [T, 2 I] float32, bfloat16 or float16: gate, then up; rows contiguous.
        out: [T, I], gate_up's dtype; rows contiguous.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    _plan((gate_up, out), version, config)(gate_up, out)


@by_layout
def _plan(tensors: tuple[Tensor, Tensor], version: str | None, config: Config | None) -> Run:
    gate_up, out = tensors
    check.dims("gate_up", gate_up, 2, "[T, 2I]")
    check.dtype("gate_up", gate_up, FLOATS)
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape[1] % 2:
        raise KernelError(f"gate_up has shape {tuple(gate_up.shape)}; expected an even number of columns")
    check.shape("out", out, (rows, columns))
    check.dtype("out", out, (gate_up.dtype,))
    check.rows("gate_up", gate_up)
    check.rows("out", out)
    device = check.cuda(gate_up=gate_up, out=out)
    if not out.numel():
        return nothing
    size = out.element_size()
    places = (gate_up.data_ptr(), gate_up.stride(0) * size, out.data_ptr(), out.stride(0) * size, columns * size)
    vec = check.vector_bytes(*places) // size
    return launcher("silu_mul", device, out.dtype, version, config, rows, columns, vec)


def build_for(dtype: torch.dtype, columns: int, vec: int, work: int) -> Build:
    return Build.of("silu_mul/silu_mul.cu", "silu_mul", DTYPE=CTYPES[dtype], COLUMNS=columns, VEC=vec, WORK=work)


def _v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    rows, columns, vec = shape["tokens"], shape["columns"], shape["vec"]
    blocks = check.num_blocks(rows * columns // vec, config.threads * config.work)
    start = prepare(build_for(dtype, columns, vec, config.work), device, blocks, config.threads, config.pdl)

    def run(gate_up: Tensor, out: Tensor) -> None:
        start(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), out.stride(0), rows)

    return run


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    numbers = shape["tokens"] * shape["columns"]
    return 3 * numbers * dtype.itemsize, 5 * numbers


_SIZES = ("tokens", "columns", "vec")
KERNEL = register(Kernel("silu_mul", (Version("v2", "cuda", floats_only, _v2),), _SIZES, _cost))
