"""qkv_post: from the output of the QKV product to rotated queries and a filled KV cache, in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import CTYPES, ID_CTYPES, Build, prepare
from minisgl.kernels.rmsnorm.op import floats_only
from minisgl.kernels.spec import FLOATS, Kernel, Run, Shape, Version, by_layout, launcher, nothing, register
from minisgl.kernels.tuning import Config
from minisgl.types import KernelError

_TENSORS = (
    "qkv", "q_weight", "k_weight", "cos_sin", "positions", "k_cache", "v_cache", "slots", "q_out", "k_scale", "v_scale",
)  # fmt: skip
FP8 = torch.float8_e4m3fn


def qkv_post(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    q_out: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    version: str | None = None,
    config: Config | None = None,
) -> None:
    """RMS norm of query and key heads (if they have weights), rotary embedding, keys and values into the cache.

    Computes in float32 and rounds once. Pairs of a rotation are D / 2 apart (the layout of Llama and Qwen checkpoints
    on the Hugging Face hub).

    Args:
        qkv: [T, (Hq + 2 Hkv) · D] float32, bfloat16 or float16: heads of queries, keys, values; rows contiguous. Its
            queries are overwritten by the rotated ones unless `q_out` is given.
        q_weight, k_weight: [D] of qkv's dtype; both None: no norm.
        eps: added to the mean of squares.
        cos_sin: [positions, D] float32, contiguous: D / 2 cosines, then D / 2 sines.
        positions: [T] int32, contiguous, each below cos_sin's rows (not checked).
        k_cache, v_cache: [slots, Hkv, D], qkv's dtype or, with scales, float8_e4m3fn; a slot's [Hkv, D] contiguous.
        slots: [T] int32 or int64, contiguous; -1 writes nothing. No slot may occur twice.
        q_out: [T, Hq, D], a token's [Hq, D] contiguous.
        k_scale, v_scale: [Hkv] float32: what keys and values are divided by; beyond ±448 they are clamped.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout, alignment or device; it names the argument.
    """
    tensors = (qkv, q_weight, k_weight, cos_sin, positions, k_cache, v_cache, slots, q_out, k_scale, v_scale)
    _plan(tensors, version, config)(*tensors, eps)


@by_layout
def _plan(tensors: tuple[Any, ...], version: str | None, config: Config | None) -> Run:
    num_q = _check(tensors)
    qkv, q_weight, _, _, _, k_cache, v_cache, slots, q_out, *_ = tensors
    given = {name: x for name, x in zip(_TENSORS, tensors, strict=True) if x is not None}
    device = check.cuda(**given)
    tokens, kv_heads, dim = slots.shape[0], k_cache.shape[1], k_cache.shape[2]
    if not tokens:
        return nothing
    sizes = (tokens, num_q, kv_heads, dim, int(q_weight is not None), slots.element_size(), int(k_cache.dtype == FP8))
    start = launcher("qkv_post", device, qkv.dtype, version, config, *sizes)
    num_slots, row, slot_k, slot_v = k_cache.shape[0], qkv.stride(0), k_cache.stride(0), v_cache.stride(0)
    q_row = row if q_out is None else q_out.stride(0)

    def run(
        qkv: Any, qw: Any, kw: Any, cos_sin: Any, positions: Any, k: Any, v: Any, slots: Any, q: Any, ks: Any, vs: Any,
        eps: float,
    ) -> None:  # fmt: skip
        start(
            qkv.data_ptr(), row, qkv.data_ptr() if q is None else q.data_ptr(), q_row,
            0 if qw is None else qw.data_ptr(), 0 if kw is None else kw.data_ptr(), eps,
            cos_sin.data_ptr(), positions.data_ptr(), k.data_ptr(), slot_k, v.data_ptr(), slot_v,
            slots.data_ptr(), num_slots, tokens, 0 if ks is None else ks.data_ptr(), 0 if vs is None else vs.data_ptr(),
        )  # fmt: skip

    return run


def _check(tensors: tuple[Any, ...]) -> int:
    """The number of query heads."""
    qkv, q_weight, k_weight, cos_sin, positions, k_cache, v_cache, slots, q_out, k_scale, v_scale = tensors
    check.dims("slots", slots, 1, "[T]")
    check.dtype("slots", slots, check.IDS)
    check.dims("k_cache", k_cache, 3, "[slots, Hkv, D]")
    tokens, kv_heads, dim = slots.shape[0], k_cache.shape[1], k_cache.shape[2]
    check.dims("qkv", qkv, 2, "[T, width]")
    check.dtype("qkv", qkv, FLOATS)
    num_q, rest = divmod(qkv.shape[1] - 2 * kv_heads * dim, dim)
    if qkv.shape[0] != tokens or rest or num_q < 1:
        raise KernelError(f"qkv has shape {tuple(qkv.shape)}; expected [{tokens}, (Hq + 2 · {kv_heads}) · {dim}]")
    if dim % 8 or dim > 256:
        raise KernelError(f"k_cache has a head_dim of {dim}; expected a multiple of 8, at most 256")
    check.shape("v_cache", v_cache, tuple(k_cache.shape))
    check_angles(cos_sin, positions, tokens, dim)
    if (q_weight is None) != (k_weight is None):
        raise KernelError("q_weight and k_weight must be given together or not at all")
    for name, x in (("qkv", qkv), ("k_cache", k_cache), ("v_cache", v_cache), ("q_out", q_out)):
        if x is not None:
            check.dtype(name, x, (FP8 if k_scale is not None and "cache" in name else qkv.dtype,))
            check.rows(name, x)
            check.aligned(name, x, 4 * x.element_size())
    for name, x in (("q_weight", q_weight), ("k_weight", k_weight)):
        if x is not None:
            check.shape(name, x, (dim,))
            check.dtype(name, x, (qkv.dtype,))
            check.contiguous(name, x)
            check.aligned(name, x, 4 * x.element_size())
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (x is None) != (k_scale is None):
            raise KernelError("k_scale and v_scale must be given together or not at all")
        if x is not None:
            check.shape(name, x, (kv_heads,))
            check.dtype(name, x, (torch.float32,))
            check.contiguous(name, x)
    if q_out is not None:
        check.shape("q_out", q_out, (tokens, num_q, dim))
    check.contiguous("slots", slots)
    return int(num_q)


def check_angles(cos_sin: Tensor, positions: Tensor, tokens: int, dim: int) -> None:
    """Checks the arguments that say how far each token is rotated."""
    check.dims("cos_sin", cos_sin, 2, "[positions, D]")
    check.shape("cos_sin", cos_sin, (cos_sin.shape[0], dim))
    check.dtype("cos_sin", cos_sin, (torch.float32,))
    check.contiguous("cos_sin", cos_sin)
    check.aligned("cos_sin", cos_sin, 16)
    check.shape("positions", positions, (tokens,))
    check.dtype("positions", positions, (torch.int32,))
    check.contiguous("positions", positions)


def head_lanes(dim: int) -> int:
    """Lanes that hold a head, as `Head::kLanes` in head.cuh."""
    return 1 << (dim // 8 - 1).bit_length()


def build_for(dtype: torch.dtype, shape: Shape, work: int) -> Build:
    types = {"DTYPE": CTYPES[dtype], "ID_T": ID_CTYPES[shape.get("id_bytes", 8)]}
    heads = {"HEAD_DIM": shape["head_dim"], "NUM_Q": shape["heads"], "NUM_KV": shape["kv_heads"]}
    options = {"HAS_NORM": shape["norm"], "FP8": shape.get("fp8", 0), "WORK": work}
    return Build.of("qkv_post/qkv_post.cu", "qkv_post", **types, **heads, **options)


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    heads = shape["heads"] + 2 * shape["kv_heads"]
    work = min(config.work, heads)
    threads = shape["tokens"] * -(-heads // work) * head_lanes(shape["head_dim"])
    build = build_for(dtype, shape, work)
    return prepare(build, device, check.num_blocks(threads, config.threads), config.threads, config.pdl)


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    heads = shape["heads"] + 2 * shape["kv_heads"]
    saved = 2 * shape["kv_heads"] * (dtype.itemsize - 1) * shape.get("fp8", 0)
    row = (2 * heads * dtype.itemsize + 4 - saved) * shape["head_dim"]
    flops = (shape["heads"] + shape["kv_heads"]) * shape["head_dim"] * (3 + 4 * shape["norm"])
    return shape["tokens"] * (row + 4 + shape.get("id_bytes", 8)), shape["tokens"] * flops


_SIZES = ("tokens", "heads", "kv_heads", "head_dim", "norm", "id_bytes", "fp8")
KERNEL = register(Kernel("qkv_post", (Version("v1", "cuda", floats_only, _v1),), _SIZES, _cost))
