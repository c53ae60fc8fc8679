"""Versions of index that the engine doesn't run, from the oldest on."""

from __future__ import annotations

from functools import partial

import torch

from minisgl.kernels import check
from minisgl.kernels.index.op import build_for
from minisgl.kernels.nvrtc import Build, prepare
from minisgl.kernels.spec import Run, Shape, Version, fits
from minisgl.kernels.store.ladder import whole_vectors
from minisgl.kernels.tuning import Config


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = shape["width"] * dtype.itemsize
    splits = next(n for n in (4, 2, 1) if n == 1 or row_bytes % (512 * n) == 0)
    build = build_for("v1", row_bytes, shape["vec"], shape["id_bytes"], SPLITS=splits)
    return prepare(build, device, check.num_blocks(shape["tokens"] * splits * 32, 128), 128, pdl=False)


def _v3_build(row_bytes: int, id_bytes: int, lanes: int, work: int, keep: int) -> Build:
    return build_for("v3", row_bytes, 16, id_bytes, LANES=lanes, WORK=work, KEEP=keep)


def _v3(keep: int, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = shape["width"] * dtype.itemsize
    lanes, work, pieces = check.split_row(row_bytes // 16, config.work)
    blocks = check.num_blocks(shape["tokens"] * pieces * lanes, config.threads)
    build = _v3_build(row_bytes, shape["id_bytes"], lanes, work, keep)
    return prepare(build, device, blocks, config.threads, config.pdl)


VERSIONS = (
    Version("v1", "cuda", fits, _v1, (build_for("v1", 8192, 16, 4, SPLITS=4),), fixed=True),
    Version("v3", "cuda", whole_vectors, partial(_v3, 0), (_v3_build(8192, 4, 32, 4, 0),), fixed=True),
    Version("v3 keep", "cuda", whole_vectors, partial(_v3, 1), (_v3_build(80, 8, 8, 1, 1),), fixed=True),
)
