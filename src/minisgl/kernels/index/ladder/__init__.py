"""Versions of index that the engine doesn't run, from the oldest on."""

from __future__ import annotations

import torch

from minisgl.kernels import check
from minisgl.kernels.index.op import build_for
from minisgl.kernels.nvrtc import prepare
from minisgl.kernels.spec import Run, Shape, Version, fits
from minisgl.kernels.tuning import Config


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = shape["width"] * dtype.itemsize
    splits = next(n for n in (4, 2, 1) if n == 1 or row_bytes % (512 * n) == 0)
    build = build_for("v1", row_bytes, shape["vec"], shape["id_bytes"], SPLITS=splits)
    return prepare(build, device, check.num_blocks(shape["tokens"] * splits * 32, 128), 128, pdl=False)


VERSIONS = (Version("v1", "cuda", fits, _v1, (build_for("v1", 8192, 16, 4, SPLITS=4),), fixed=True),)
