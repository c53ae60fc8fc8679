"""rope: rotary position embedding of query and key heads, in place, alone: the engine runs it inside `qkv_post`."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import CTYPES, Build, prepare
from minisgl.kernels.qkv_post.op import check_angles, head_lanes
from minisgl.kernels.rmsnorm.ladder import triton_fits
from minisgl.kernels.rmsnorm.op import floats_only
from minisgl.kernels.spec import FLOATS, Run, Shape, Version, by_layout, launcher, nothing
from minisgl.kernels.tuning import Config
from minisgl.types import KernelError


def rope(
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    *,
    version: str | None = None,
    config: Config | None = None,
) -> None:
    """Rotates every head of `q` and `k` in place (Su et al., 2021), in float32; pairs are D / 2 apart.

    Args:
        q, k: [T, Hq, D] and [T, Hkv, D] float32, bfloat16 or float16; a token's heads contiguous. D is a multiple of
            8, at most 256.
        cos_sin: [positions, D] float32, contiguous: D / 2 cosines, then D / 2 sines.
        positions: [T] int32, contiguous, each below cos_sin's rows (not checked).

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout, alignment or device; it names the argument.
    """
    _plan((q, k, cos_sin, positions), version, config)(q, k, cos_sin, positions)


@by_layout
def _plan(tensors: tuple[Tensor, ...], version: str | None, config: Config | None) -> Run:
    q, k, cos_sin, positions = tensors
    check.dims("q", q, 3, "[T, Hq, D]")
    check.dtype("q", q, FLOATS)
    check.dims("k", k, 3, "[T, Hkv, D]")
    tokens, heads, dim = q.shape
    if dim % 8 or dim > 256:
        raise KernelError(f"q has a head_dim of {dim}; expected a multiple of 8, at most 256")
    check.shape("k", k, (tokens, k.shape[1], dim))
    for name, x in (("q", q), ("k", k)):
        check.dtype(name, x, (q.dtype,))
        check.rows(name, x)
        check.aligned(name, x, 4 * x.element_size())
    check_angles(cos_sin, positions, tokens, dim)
    device = check.cuda(q=q, k=k, cos_sin=cos_sin, positions=positions)
    return launcher("rope", device, q.dtype, version, config, tokens, heads, k.shape[1], dim) if tokens else nothing


def build_for(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, work: int) -> Build:
    macros = {"HEAD_DIM": dim, "NUM_Q": heads, "NUM_KV": kv_heads, "WORK": work}
    return Build.of("rope/ladder/rope.cu", "rope", DTYPE=CTYPES[dtype], **macros)


def _v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    tokens, heads, kv_heads, dim = (shape[n] for n in ("tokens", "heads", "kv_heads", "head_dim"))
    work = min(config.work, heads + kv_heads)
    blocks = check.num_blocks(tokens * -(-(heads + kv_heads) // work) * head_lanes(dim), config.threads)
    start = prepare(build_for(dtype, heads, kv_heads, dim, work), device, blocks, config.threads, config.pdl)

    def run(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
        tables = cos_sin.data_ptr(), positions.data_ptr()
        start(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), *tables, tokens)

    return run


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.rope.ladder import triton_v1

    return triton_v1.run


def cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    numbers = shape["tokens"] * (shape["heads"] + shape["kv_heads"]) * shape["head_dim"]
    return numbers * 2 * dtype.itemsize + shape["tokens"] * (shape["head_dim"] + 1) * 4, 3 * numbers


SIZES = ("tokens", "heads", "kv_heads", "head_dim")
VERSIONS = (Version("v2", "cuda", floats_only, _v2), Version("v1", "triton", triton_fits, _v1))
