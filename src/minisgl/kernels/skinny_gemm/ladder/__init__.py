"""Versions of skinny_gemm that the engine doesn't run."""

from __future__ import annotations

import torch

from minisgl.kernels.rmsnorm.ladder import triton_fits
from minisgl.kernels.spec import Run, Shape, Version
from minisgl.kernels.tuning import Config


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.skinny_gemm.ladder import triton_v1

    return triton_v1.run


VERSIONS = (Version("v1", "triton", triton_fits, _v1),)
