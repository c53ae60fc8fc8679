"""Versions of store that the engine doesn't run, from the oldest on."""

from __future__ import annotations

import torch

from minisgl.kernels import check
from minisgl.kernels.nvrtc import prepare
from minisgl.kernels.spec import Run, Shape, Version, fits
from minisgl.kernels.store.op import build_for, row_bytes_of
from minisgl.kernels.tuning import Config


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    build = build_for("v1", row_bytes_of(dtype, shape), shape["vec"], shape["id_bytes"])
    return prepare(build, device, check.num_blocks(shape["tokens"] * 32, 128), 128, pdl=False)


VERSIONS = (Version("v1", "cuda", fits, _v1, (build_for("v1", 2048, 16, 8),), fixed=True),)
