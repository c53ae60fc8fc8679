"""Versions of skinny_gemm that the engine doesn't run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.nvrtc import CTYPES, Build, Capability, prepare
from minisgl.kernels.rmsnorm.ladder import triton_fits
from minisgl.kernels.skinny_gemm.op import KERNEL, MMA, prepare_v3
from minisgl.kernels.spec import Run, Shape, Version
from minisgl.kernels.tuning import Config


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.skinny_gemm.ladder import triton_v1

    return triton_v1.run


def _fits_v2(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    if dtype in MMA and (shape["k"] % 32 or shape["n"] % (32 if shape["gated"] else 16)):
        return f"a weight of {shape['n']} x {shape['k']} doesn't divide into tiles of 16 x 32"
    return KERNEL.versions[0].supports(where, dtype, shape)


def tiling_v2(shape: Shape, config: Config) -> tuple[int, int, int]:
    """Warps, tiles of 16 rows of the weight a block, and depth: as `config` wants, if the shape allows."""
    most, batch_tiles = shape["n"] // 16, -(-shape["tokens"] // 8)
    wanted = max(config.work, 1 + shape["gated"])
    tiles = next(t for t in (4, 2, 1) if t <= wanted and most % t == 0)
    depth = min(8 // (tiles * batch_tiles), 4, -(-shape["k"] // config.threads))
    return config.threads // 32, tiles, max(1, depth)


def build_v2(dtype: torch.dtype, shape: Shape, warps: int, tiles: int, depth: int) -> Build:
    sizes = {"BATCH": -(-shape["tokens"] // 8) * 8, "COLUMNS": shape["n"], "WIDTH": shape["k"]}
    fused = {"NORM": shape["norm"], "GATED": shape["gated"], "ADD": shape["add"]}
    types = {"DTYPE": CTYPES[dtype], "MMA_TYPE": f'"{MMA[dtype]}"'}
    loops = {"WARPS": warps, "TILES": tiles, "DEPTH": depth}
    return Build.of("skinny_gemm/ladder/skinny_gemm_v2.cu", "skinny_gemm", **types, **sizes, **fused, **loops)


def _v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    warps, tiles, depth = tiling_v2(shape, config)
    build = build_v2(dtype, shape, warps, tiles, depth)
    start = prepare(build, device, shape["n"] // 16 // tiles, warps * 32, config.pdl)

    def run(x: Tensor, weight: Tensor, out: Tensor, norm: Any, eps: float, _: bool, __: bool) -> None:
        gain = 0 if norm is None else norm.data_ptr()
        start(x.data_ptr(), x.stride(0), weight.data_ptr(), gain, eps, out.data_ptr(), out.stride(0), x.shape[0])

    return run


def _shape(tokens: int, n: int, k: int, norm: int = 0, gated: int = 0, add: int = 0) -> Shape:
    return {"tokens": tokens, "n": n, "k": k, "norm": norm, "gated": gated, "add": add}


_BUILDS = (
    build_v2(torch.bfloat16, _shape(8, 6144, 1024, 1, 1), 8, 2, 4),
    build_v2(torch.float16, _shape(64, 4096, 4096), 8, 1, 1),
    build_v2(torch.bfloat16, _shape(1, 1024, 2048, add=1), 8, 1, 4),
)
VERSIONS = (
    Version("v3 close", "cuda", KERNEL.versions[0].supports, partial(prepare_v3, apart=0)),
    Version("v2", "cuda", _fits_v2, _v2, _BUILDS),
    Version("v1", "triton", triton_fits, _v1),
)
