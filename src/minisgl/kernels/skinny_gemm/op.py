"""Matrix products with up to 64 rows of activations, fused with the norm before them and with what comes behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import CTYPES, Build, Capability, prepare
from minisgl.kernels.spec import FLOATS, Kernel, Run, Shape, Version, by_layout, launcher, nothing, register
from minisgl.kernels.tuning import Config, choose_product
from minisgl.types import KernelError

MAX_ROWS = 64
MMA = {torch.bfloat16: "bf16", torch.float16: "f16"}


def tuned(x: Tensor, weight: Tensor, norm: bool = False, gated: bool = False, add: bool = False) -> Config | None:
    """The configuration for a product that was measured to beat cuBLAS and its neighbours' kernels; None: leave it.

    Nothing is assumed of products that nobody has measured; arguments as for `skinny_gemm`. None behind a norm in
    float16: the kernel divides by the rows' size at the end, and sums of the residual stream times a gain overflow.
    """
    if x.shape[0] > MAX_ROWS or x.dtype not in MMA or (norm and x.dtype == torch.float16):
        return None
    n, k = weight.shape
    return choose_product(product_name(n, k, norm, gated, add), x.get_device(), x.shape[0])


def product_name(n: int, k: int, norm: bool, gated: bool, add: bool) -> str:
    """A product's name in a tuning table: its weight's shape and what it is fused with."""
    return f"skinny_gemm {n}x{k}" + " norm" * norm + " silu" * gated + " add" * add


def skinny_gemm(
    x: Tensor, weight: Tensor, out: Tensor, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False,
    add: bool = False, *, version: str | None = None, config: Config | None = None,
) -> None:  # fmt: skip
    """out = norm(x) · weightᵀ, or silu(gate) · up of it, or added to what `out` holds. Sums are float32.

    Args:
        x: [T, K] bfloat16 or float16 (a version in the laboratory: float32), T up to 64; rows contiguous and aligned
            to 16 bytes.
        weight: [N, K], x's dtype, contiguous.
        out: [T, N], or [T, N / 2] if gated, x's dtype, rows contiguous. It mustn't overlap x.
        norm: [K], x's dtype: gain of an RMS norm of x's rows, with `eps`; None: x as it is.
        gated: weight holds gate rows, then up rows; out = silu(gate) · up.
        add: the product is added to `out`, the residual stream.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    _plan((x, weight, out, norm), gated, add, version, config)(x, weight, out, norm, eps, gated, add)


@by_layout
def _plan(tensors: tuple[Tensor, ...], gated: bool, add: bool, version: str | None, config: Config | None) -> Run:
    x, weight, out, norm = tensors
    check.dims("x", x, 2, "[T, K]")
    check.dims("weight", weight, 2, "[N, K]")
    (rows, k), n = x.shape, weight.shape[0]
    given = {"x": x, "weight": weight, "out": out} | ({} if norm is None else {"norm": norm})
    shapes = {"weight": (n, k), "out": (rows, n // 2 if gated else n), "norm": (k,)}
    for name, y in given.items():
        check.dtype(name, y, FLOATS if y is x else (x.dtype,))
        check.shape(name, y, shapes.get(name, (rows, k)))
        (check.contiguous if name in ("weight", "norm") else check.rows)(name, y)
        check.aligned(name, y, y.element_size() if y is out else 16)
    if rows > MAX_ROWS:
        raise KernelError(f"x has {rows} rows; expected at most {MAX_ROWS}")
    device, fused = check.cuda(**given), (int(norm is not None), int(gated), int(add))
    return launcher("skinny_gemm", device, x.dtype, version, config, rows, n, k, *fused) if rows else nothing


def _fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    if dtype not in MMA:
        return "expected bfloat16 or float16"
    if shape["k"] % 32 or shape["n"] % (16 if shape["gated"] else 8):
        return f"a weight of {shape['n']} x {shape['k']} doesn't divide into tiles of 8 x 32"
    return None


def tiling(shape: Shape, config: Config) -> tuple[int, int, int]:
    """Warps, groups of eight rows of the weight a block, depth: as `config` wants, if memory and registers allow."""
    batch_tiles, least = -(-shape["tokens"] // 8), 1 + shape["gated"]
    warps = min(config.threads // 32, 128 // (batch_tiles * least))
    most = max(min(config.work, 16 // batch_tiles, 128 // (warps * batch_tiles)), least)
    eights = next(e for e in (8, 4, 2, 1) if e <= most and shape["n"] % (8 * e) == 0)
    depth = min(20 // (eights + batch_tiles + shape["norm"]), -(-shape["k"] // (32 * warps)))
    return warps, eights, max(1, depth)


def build_for(dtype: torch.dtype, shape: Shape, warps: int, eights: int, depth: int, apart: int = 1) -> Build:
    sizes = {"BATCH": -(-shape["tokens"] // 8) * 8, "COLUMNS": shape["n"], "WIDTH": shape["k"]}
    fused = {"NORM": shape["norm"], "GATED": shape["gated"], "ADD": shape["add"], "RESIDENT": max(1, 16 // warps)}
    types = {"DTYPE": CTYPES[dtype], "MMA_TYPE": f'"{MMA[dtype]}"'}
    loops = {"WARPS": warps, "EIGHTS": eights, "DEPTH": depth, "APART": apart}
    return Build.of("skinny_gemm/skinny_gemm.cu", "skinny_gemm", **types, **sizes, **fused, **loops)


def prepare_v3(device: int, dtype: torch.dtype, shape: Shape, config: Config, apart: int = 1) -> Run:
    warps, eights, depth = tiling(shape, config)
    resident = torch.cuda.get_device_properties(device).multi_processor_count * max(1, 16 // warps)
    pieces = shape["n"] // 8 // eights
    blocks = -(-pieces // -(-pieces // resident))  # as few rounds as it takes, all alike
    start = prepare(build_for(dtype, shape, warps, eights, depth, apart), device, blocks, warps * 32, config.pdl)

    def run(x: Tensor, weight: Tensor, out: Tensor, norm: Any, eps: float, _: bool, __: bool) -> None:
        gain = 0 if norm is None else norm.data_ptr()
        start(x.data_ptr(), x.stride(0), weight.data_ptr(), gain, eps, out.data_ptr(), out.stride(0), x.shape[0])

    return run


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    tokens, n, k = shape["tokens"], shape["n"], shape["k"]
    elements = n * k + k * shape["norm"] + tokens * (k + n // (1 + shape["gated"]) * (1 + shape["add"]))
    return elements * dtype.itemsize, 2 * tokens * n * k


_SIZES = ("tokens", "n", "k", "norm", "gated", "add")
KERNEL = register(Kernel("skinny_gemm", (Version("v3", "cuda", _fits, prepare_v3),), _SIZES, _cost))
