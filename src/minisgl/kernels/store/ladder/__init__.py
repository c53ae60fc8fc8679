"""Versions of store that the engine doesn't run: steps of the ladder, and what was said to help.

`v1` and `v3` are steps; `narrow`, `wide`, `staged` and `shuffle` differ from them in one idea each; `sorted` sorts the
slots first, and its time includes the sort.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import Build, Capability, prepare
from minisgl.kernels.spec import Run, Shape, Version, fits
from minisgl.kernels.store.op import build_for, check_arguments, row_bytes_of
from minisgl.kernels.tuning import Config, choose
from minisgl.types import KernelError

SHARED_BYTES = 48 << 10  # that a block has without asking
GROUP = 4  # tokens of a warp in `shuffle`


def whole_vectors(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    """`supports` of a version that moves 16 bytes at a time and nothing else."""
    vec = shape.get("vec", 16)
    return None if vec == 16 else f"addresses, strides or rows are multiples of {vec} bytes; expected 16"


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    build = build_for("v1", row_bytes_of(dtype, shape), shape["vec"], shape["id_bytes"])
    return prepare(build, device, check.num_blocks(shape["tokens"] * 32, 128), 128, pdl=False)


def _narrow(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    """v2 with 8 bytes a lane, half of what a lane can ask for at once; expected: a loss, or nothing.

    Measured (H100, µs at 1 / 64 / 256 / 1024 tokens): 1.25 / 1.44 / 1.90 / 4.22 for v2's 1.08 / 1.42 / 1.85 / 4.20.
    """
    row_bytes, vec = row_bytes_of(dtype, shape), min(shape["vec"], 8)
    lanes, work, pieces = check.split_row(row_bytes // vec, config.work)
    build = build_for("v2", row_bytes, vec, shape["id_bytes"], LANES=lanes, WORK=work)
    blocks = check.num_blocks(shape["tokens"] * 2 * pieces * lanes, config.threads)
    return prepare(build, device, blocks, config.threads, config.pdl)


def _wide(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = row_bytes_of(dtype, shape)
    pieces = -(-row_bytes // (32 * 32))
    blocks = check.num_blocks(shape["tokens"] * 2 * pieces * 32, config.threads)
    return prepare(build_for("wide", row_bytes, 16, shape["id_bytes"]), device, blocks, config.threads, config.pdl)


def _warps(row_bytes: int) -> int:
    """Warps of a block whose key and value rows fit into shared memory together."""
    return min(4, SHARED_BYTES // (2 * row_bytes))


def _staged(version: str, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = row_bytes_of(dtype, shape)
    warps = _warps(row_bytes)
    build = build_for(version, row_bytes, 16, shape["id_bytes"], WARPS=warps)
    return prepare(build, device, -(-shape["tokens"] // warps), 32 * warps, config.pdl)


def _staged_fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    row_bytes = row_bytes_of(dtype, shape)
    if not _warps(row_bytes):
        return f"rows of {row_bytes} bytes don't fit into {SHARED_BYTES} bytes of shared memory"
    return whole_vectors(where, dtype, shape)


def _shuffle(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    build = build_for("shuffle", row_bytes_of(dtype, shape), shape["vec"], shape["id_bytes"], GROUP=GROUP)
    blocks = check.num_blocks(-(-shape["tokens"] // GROUP) * 32, config.threads)
    return prepare(build, device, blocks, config.threads, config.pdl)


# -- slots sorted first: more than a launch, so it has a public function of its own -----------------------------------


def _sorted_build(row_bytes: int, vec: int, id_bytes: int, lanes: int, work: int) -> Build:
    return build_for("sorted", row_bytes, vec, id_bytes, LANES=lanes, WORK=work)


def store_sorted(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """As `store`, in ascending order of the slots, which are sorted first."""
    check_arguments(k_cache, v_cache, k, v, slots)
    device = check.cuda(k_cache=k_cache, v_cache=v_cache, k=k, v=v, slots=slots)
    if not k.numel():
        return
    size, tokens, tensors = k.element_size(), k.shape[0], (k_cache, v_cache, k, v)
    row_bytes = k.shape[1] * k.shape[2] * size
    vec = check.vector_bytes(*(x.stride(0) * size for x in tensors), *(x.data_ptr() for x in tensors), row_bytes)
    config = choose("store", device, 4 * tokens * row_bytes)
    lanes, work, pieces = check.split_row(row_bytes // vec, config.work)
    blocks = check.num_blocks(tokens * 2 * pieces * lanes, config.threads)
    build = _sorted_build(row_bytes, vec, slots.element_size(), lanes, work)
    start = prepare(build, device, blocks, config.threads, config.pdl)
    order = torch.argsort(slots)
    places = [place for x in tensors for place in (x.data_ptr(), x.stride(0) * size)]
    start(*places, slots.data_ptr(), k_cache.shape[0], tokens, order.data_ptr())


def _no_launch(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    raise KernelError("sorted is more than a launch; call store_sorted")


VERSIONS = (
    Version("v1", "cuda", fits, _v1, (build_for("v1", 2048, 16, 8),), fixed=True),
    Version(
        "v3",
        "cuda",
        _staged_fits,
        partial(_staged, "v3"),
        (build_for("v3", 2048, 16, 8, WARPS=4), build_for("v3", 80, 16, 4, WARPS=4)),
        fixed=True,
    ),
    Version("narrow", "cuda", fits, _narrow, (build_for("v2", 2048, 8, 8, LANES=32, WORK=2),), fixed=True),
    Version("wide", "cuda", whole_vectors, _wide, (build_for("wide", 2048, 16, 4),), fixed=True),
    Version(
        "staged",
        "cuda",
        _staged_fits,
        partial(_staged, "staged"),
        (build_for("staged", 2048, 16, 8, WARPS=4),),
        fixed=True,
    ),
    Version("shuffle", "cuda", fits, _shuffle, (build_for("shuffle", 2048, 16, 8, GROUP=GROUP),), fixed=True),
    Version("sorted", "cuda", fits, _no_launch, (_sorted_build(2048, 16, 8, 32, 2),), fixed=True),
)
