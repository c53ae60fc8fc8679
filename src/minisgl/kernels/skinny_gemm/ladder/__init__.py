"""Versions of skinny_gemm that the engine doesn't run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.nvrtc import CTYPES, Build, Capability, prepare
from minisgl.kernels.rmsnorm.ladder import triton_fits
from minisgl.kernels.skinny_gemm.op import MMA, fits
from minisgl.kernels.spec import Run, Shape, Version
from minisgl.kernels.tuning import Config


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.skinny_gemm.ladder import triton_v1

    return triton_v1.run


def tiling_v3(shape: Shape, config: Config) -> tuple[int, int, int]:
    """Warps, groups of eight rows of the weight a block, and depth: as `config` wants, if the shape allows."""
    batch_tiles, warps = -(-shape["tokens"] // 8), config.threads // 32
    most = min(max(config.work, 1 + shape["gated"]), max(16 // batch_tiles, 2))
    eights = next(e for e in (8, 4, 2, 1) if e <= most and shape["n"] % (8 * e) == 0)
    steps = -(-shape["k"] // (32 * warps))
    depth = min(20 // (eights + batch_tiles + shape["norm"]), steps)
    return warps, eights, max(1, depth)


def build_v3(dtype: torch.dtype, shape: Shape, warps: int, eights: int, depth: int, apart: int = 0) -> Build:
    sizes = {"BATCH": -(-shape["tokens"] // 8) * 8, "COLUMNS": shape["n"], "WIDTH": shape["k"]}
    fused = {"NORM": shape["norm"], "GATED": shape["gated"], "ADD": shape["add"]}
    types = {"DTYPE": CTYPES[dtype], "MMA_TYPE": f'"{MMA[dtype]}"'}
    loops = {"WARPS": warps, "EIGHTS": eights, "DEPTH": depth, "APART": apart, "RESIDENT": max(1, 16 // warps)}
    source = "skinny_gemm/ladder/skinny_gemm_v3.cu"
    return Build.of(source, "skinny_gemm", **types, **sizes, **fused, **loops)


def _v3(apart: int, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    warps, eights, depth = tiling_v3(shape, config)
    pieces = shape["n"] // 8 // eights
    resident = torch.cuda.get_device_properties(device).multi_processor_count * max(1, 16 // warps)
    blocks = -(-pieces // -(-pieces // resident))  # as few rounds as it takes, all alike
    start = prepare(build_v3(dtype, shape, warps, eights, depth, apart), device, blocks, warps * 32, config.pdl)

    def run(x: Tensor, weight: Tensor, out: Tensor, norm: Any, eps: float, _: bool, __: bool, ahead: Any) -> None:
        gain = 0 if norm is None else norm.data_ptr()
        start(x.data_ptr(), x.stride(0), weight.data_ptr(), gain, eps, out.data_ptr(), out.stride(0), x.shape[0])

    return run


def _fits_v3(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    if dtype in MMA and shape["n"] % (16 if shape["gated"] else 8) == 0 and shape["k"] % 32 == 0:
        return None
    return fits(where, dtype, shape)


def _shape(tokens: int, n: int, k: int, norm: int = 0, gated: int = 0, add: int = 0) -> Shape:
    return {"tokens": tokens, "n": n, "k": k, "norm": norm, "gated": gated, "add": add}


_BUILDS = (
    build_v3(torch.bfloat16, _shape(1, 24576, 4096, 1, 1), 8, 4, 3),
    build_v3(torch.bfloat16, _shape(8, 1024, 3072, add=1), 16, 1, 4),
    build_v3(torch.float16, _shape(32, 4096, 4096), 8, 2, 1, 1),
)
VERSIONS = (
    Version("v3", "cuda", _fits_v3, partial(_v3, 0), _BUILDS),
    Version("v3 apart", "cuda", _fits_v3, partial(_v3, 1)),
    Version("v1", "triton", triton_fits, _v1),
)
