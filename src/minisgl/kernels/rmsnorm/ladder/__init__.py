"""Versions of the norms that the engine doesn't run: it has no rows too wide for a block."""

from __future__ import annotations

import importlib.util

import torch

from minisgl.kernels.nvrtc import Capability
from minisgl.kernels.rmsnorm.op import floats_only
from minisgl.kernels.spec import Run, Shape, Version
from minisgl.kernels.tuning import Config


def triton_fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    """`supports` of Triton versions."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton isn't installed"
    return floats_only(where, dtype, shape)


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.rmsnorm.ladder import triton_v1

    return triton_v1.run


VERSIONS = (Version("v1", "triton", triton_fits, _v1),)
