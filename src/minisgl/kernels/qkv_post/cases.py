"""qkv_post in the laboratory: its reference, and what it is tested and measured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.qkv_post.op import KERNEL, build_for, qkv_post
from minisgl.kernels.rmsnorm.cases import norm
from minisgl.kernels.rope.cases import random_angles, rotate
from minisgl.kernels.spec import KernelSpec, Shape, register
from minisgl.kernels.store.cases import random_slots
from minisgl.kernels.tuning import Config

FP8_MAX = 448.0  # of e4m3


def _parts(qkv: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv = k_cache.shape[1]
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // k_cache.shape[2], k_cache.shape[2])
    return heads[:, : -2 * kv], heads[:, -2 * kv : -kv], heads[:, -kv:]


def _reference(
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
) -> None:
    q, k, v = _parts(qkv, k_cache)
    if q_weight is not None and k_weight is not None:
        q, k = norm(q, q_weight, eps), norm(k, k_weight, eps)
    q, k = rotate(q, cos_sin, positions), rotate(k, cos_sin, positions)
    valid = (slots >= 0) & (slots < k_cache.shape[0])
    for cache, x, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        x = x[valid]
        if scale is not None:  # as bytes: torch assigns no float8
            x = (x / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache[slots[valid].long()] = x
    (_parts(qkv, k_cache)[0] if q_out is None else q_out).copy_(q)


def _library(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> None:
    q, k, v = _parts(qkv, k_cache)
    q_normed, k_normed = q, k
    if q_weight is not None and k_weight is not None:
        q_normed = torch.nn.functional.rms_norm(q, q.shape[-1:], q_weight, eps)
        k_normed = torch.nn.functional.rms_norm(k, k.shape[-1:], k_weight, eps)
    q.copy_(rotate(q_normed, cos_sin, positions))
    k_cache.index_copy_(0, slots, rotate(k_normed, cos_sin, positions))
    v_cache.index_copy_(0, slots, v)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    tokens, heads, kv, dim = (shape[n] for n in ("tokens", "heads", "kv_heads", "head_dim"))
    width = (heads + 2 * kv) * dim
    qkv = torch.randn(copies, tokens, width + shape.get("pad", 0), dtype=dtype, device=device, generator=generator)
    weights: list[Tensor | None] = [None, None]
    if shape["norm"]:
        weights = [torch.randn(dim, dtype=dtype, device=device, generator=generator) for _ in range(2)]
    cos_sin, positions = random_angles(shape, device, generator, copies)
    caches = [torch.empty(shape["slots"], kv, dim, dtype=dtype, device=device) for _ in range(2)]
    slots = random_slots(shape, device, generator, copies)
    out: list[tuple[Tensor, ...]] = [() for _ in range(copies)]
    if shape.get("q_out"):
        out = [(torch.empty(tokens, heads, dim, dtype=dtype, device=device),) for _ in range(copies)]
    return [
        (qkv[i, :, :width], *weights, 1e-6, cos_sin, positions[i], *caches, slots[i], *out[i]) for i in range(copies)
    ]


def _case(tokens: int, heads: int, kv_heads: int, head_dim: int, norm: int = 1, **more: int) -> Shape:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "norm": norm, **more}


SPEC = register(
    KernelSpec(
        name=KERNEL.name,
        run=qkv_post,
        reference=_reference,
        library=_library,
        versions=KERNEL.versions,
        sizes=KERNEL.sizes,
        inputs=_inputs,
        outputs=(6, 7, 9),
        updated=(0,),
        cost=KERNEL.cost,
        tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
        cases=(
            _case(1, 16, 8, 128, slots=40),
            _case(37, 9, 3, 64, norm=0, slots=100, id_bytes=4, skip=5),
            _case(6, 5, 1, 80, slots=33, pad=16),
            _case(19, 7, 7, 96, slots=50, skip=2, q_out=1),
            _case(3, 3, 3, 256, norm=0, slots=8, q_out=1),
            _case(130, 32, 8, 128, slots=300, id_bytes=4),
            _case(0, 4, 2, 64, slots=4),
        ),
        bench=tuple(_case(n, 16, 8, 128, slots=262_144) for n in (1, 64, 256, 1024, 4096, 16384)),
        tunable=tuple(_case(4**n, 16, 8, 128, slots=262_144) for n in range(8)),
        configs=tuple(Config(threads, work) for threads in (64, 128, 256) for work in (1, 2, 4)),
        builds=tuple(
            build_for(dtype, {"heads": 16, "kv_heads": 8, "head_dim": dim, "norm": norm, "fp8": fp8}, work)
            for dtype, dim, norm, work, fp8 in (
                (torch.bfloat16, 128, 1, 1, 0),
                (torch.float16, 80, 0, 2, 0),
                (torch.float32, 256, 1, 2, 0),
                (torch.bfloat16, 64, 0, 4, 0),
                (torch.bfloat16, 96, 1, 2, 0),
                (torch.bfloat16, 128, 1, 1, 1),
                (torch.float16, 64, 0, 2, 1),
            )
        ),
    )
)
