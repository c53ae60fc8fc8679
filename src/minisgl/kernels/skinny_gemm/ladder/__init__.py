"""Matrix products with up to 64 rows of activations, fused with the norm before them and with what comes behind."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import CTYPES, Build, Capability, prepare
from minisgl.kernels.rmsnorm.op import triton_fits
from minisgl.kernels.spec import FLOATS, Run, Shape, Version, by_layout, launcher, nothing
from minisgl.kernels.tuning import Config
from minisgl.types import KernelError

MAX_ROWS = 64
_MMA = {torch.bfloat16: "bf16", torch.float16: "f16"}


def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
    *,
    version: str | None = None,
    config: Config | None = None,
) -> None:
    """out = norm(x) · weightᵀ, or silu(gate) · up of it, or added to what `out` holds. Sums are float32.

    Args:
        x: [T, K] float32, bfloat16 or float16, T up to 64; rows contiguous and aligned to 16 bytes.
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
    rows, columns = x.shape[0], weight.shape[0]
    check.shape("weight", weight, (columns, x.shape[1]))
    check.shape("out", out, (rows, columns // 2 if gated else columns))
    given = {"x": x, "weight": weight, "out": out} | ({} if norm is None else {"norm": norm})
    for name, y in given.items():
        check.dtype(name, y, FLOATS if y is x else (x.dtype,))
        if y is weight or y is norm:
            check.contiguous(name, y)
        check.rows(name, y)
        check.aligned(name, y, y.element_size() if y is out else 16)
    if norm is not None:
        check.shape("norm", norm, (x.shape[1],))
    if rows > MAX_ROWS:
        raise KernelError(f"x has {rows} rows; expected at most {MAX_ROWS}")
    device = check.cuda(**given)
    if not rows:
        return nothing
    kernel = "skinny_gemm_add" if add else "skinny_gemm"
    return launcher(
        kernel, device, x.dtype, version, config, rows, columns, x.shape[1], int(norm is not None), int(gated)
    )


def _fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    if dtype not in _MMA:
        return "expected bfloat16 or float16"
    if shape["k"] % 32 or shape["n"] % (32 if shape["gated"] else 16):
        return f"a weight of {shape['n']} x {shape['k']} doesn't divide into tiles of 16 x 32"
    return None


def tiling(shape: Shape, config: Config) -> tuple[int, int, int]:
    """Warps, tiles of 16 rows of the weight a block, and depth: as `config` wants, if the shape allows."""
    most, batch_tiles = shape["n"] // 16, -(-shape["tokens"] // 8)
    wanted = max(config.work, 1 + shape["gated"])
    tiles = next(t for t in (4, 2, 1) if t <= wanted and most % t == 0)
    depth = min(8 // (tiles * batch_tiles), 4, -(-shape["k"] // config.threads))
    return config.threads // 32, tiles, max(1, depth)


def build_for(add: int, dtype: torch.dtype, shape: Shape, warps: int, tiles: int, depth: int) -> Build:
    return Build.of(
        "skinny_gemm/ladder/skinny_gemm.cu", "skinny_gemm", DTYPE=CTYPES[dtype], MMA_TYPE=f'"{_MMA[dtype]}"',
        BATCH=-(-shape["tokens"] // 8) * 8, COLUMNS=shape["n"], WIDTH=shape["k"], NORM=shape["norm"],
        GATED=shape["gated"],
        ADD=add, WARPS=warps, TILES=tiles, DEPTH=depth, EARLY=1,
    )  # fmt: skip


def _v2(add: int, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    warps, tiles, depth = tiling(shape, config)
    build = build_for(add, dtype, shape, warps, tiles, depth)
    start = prepare(build, device, shape["n"] // 16 // tiles, warps * 32, config.pdl)

    def run(x: Tensor, weight: Tensor, out: Tensor, norm: Tensor | None, eps: float, gated: bool, added: bool) -> None:
        gain = 0 if norm is None else norm.data_ptr()
        start(x.data_ptr(), x.stride(0), weight.data_ptr(), gain, eps, out.data_ptr(), out.stride(0), x.shape[0])

    return run


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.skinny_gemm.ladder import triton_v1

    return triton_v1.run


def _shape(tokens: int, n: int, k: int, norm: int = 0, gated: int = 0) -> Shape:
    return {"tokens": tokens, "n": n, "k": k, "norm": norm, "gated": gated}


def versions(add: int) -> tuple[Version, ...]:
    """Best first, as far as one knows without having measured them."""
    plain = (
        (torch.bfloat16, _shape(1, 4096, 1024, 1), 8, 1, 4),
        (torch.bfloat16, _shape(8, 6144, 1024, 1, 1), 8, 2, 4),
        (torch.float16, _shape(64, 4096, 4096), 8, 1, 1),
        (torch.bfloat16, _shape(32, 24576, 4096, 1, 1), 4, 2, 1),
        (torch.bfloat16, _shape(16, 960, 576, 1), 4, 4, 1),
    )
    added = ((torch.bfloat16, _shape(1, 1024, 2048), 8, 1, 4), (torch.float16, _shape(40, 4096, 12288), 16, 2, 1))
    builds = tuple(build_for(add, *rest) for rest in (added if add else plain))

    def prepare_v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
        return _v2(add, device, dtype, shape, config)

    return (
        Version("v2", "cuda", _fits, prepare_v2, builds),
        Version("v1", "triton", triton_fits, _v1),
    )
