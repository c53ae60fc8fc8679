"""store: keys and values of this step's tokens into their slots of the KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import ID_CTYPES, Build, prepare
from minisgl.kernels.spec import FLOATS, KernelSpec, Run, Shape, Version, by_layout, launcher, nothing, register
from minisgl.kernels.tuning import Config


def store(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    version: str | None = None,
    config: Config | None = None,
) -> None:
    """Writes `k[t]` and `v[t]` to slot `slots[t]` of the caches; a slot of -1 (or any out of range) writes nothing.

    Args:
        k_cache, v_cache: [slots, Hkv, D], any dtype; a slot's [Hkv, D] contiguous.
        k, v: [T, Hkv, D], the caches' dtype; a token's [Hkv, D] contiguous, as in slices of a fused QKV output.
        slots: [T] int32 or int64, contiguous. No slot may occur twice.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    _plan((k_cache, v_cache, k, v, slots), version, config)(k_cache, v_cache, k, v, slots)


@by_layout
def _plan(tensors: tuple[Tensor, ...], version: str | None, config: Config | None) -> Run:
    k_cache, v_cache, k, v, slots = tensors
    _check(k_cache, v_cache, k, v, slots)
    device = check.cuda(k_cache=k_cache, v_cache=v_cache, k=k, v=v, slots=slots)
    if not k.numel():
        return nothing
    size, tokens, num_slots = k.element_size(), k.shape[0], k_cache.shape[0]
    strides = [x.stride(0) * size for x in tensors[:4]]
    vec = check.vector_bytes(*strides, *(x.data_ptr() for x in tensors[:4]), k.shape[1] * k.shape[2] * size)
    start = launcher("store", device, k.dtype, version, config, *k.shape, vec, slots.element_size())
    kc, vc, ks, vs = strides

    def run(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        caches = k_cache.data_ptr(), kc, v_cache.data_ptr(), vc
        start(*caches, k.data_ptr(), ks, v.data_ptr(), vs, slots.data_ptr(), num_slots, tokens)

    return run


def _check(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    check.dims("k_cache", k_cache, 3, "[slots, Hkv, D]")
    check.dims("slots", slots, 1, "[T]")
    check.dtype("slots", slots, check.IDS)
    check.contiguous("slots", slots)
    check.rows("k_cache", k_cache)
    expected = (slots.shape[0], k_cache.shape[1], k_cache.shape[2])
    for name, x, shape in (("v_cache", v_cache, tuple(k_cache.shape)), ("k", k, expected), ("v", v, expected)):
        check.shape(name, x, shape)
        check.dtype(name, x, (k_cache.dtype,))
        check.rows(name, x)


def _row_bytes(dtype: torch.dtype, shape: Shape) -> int:
    return shape["heads"] * shape["head_dim"] * dtype.itemsize


def _build(version: str, row_bytes: int, vec: int, id_bytes: int, **macros: int) -> Build:
    macros |= {"ROW_BYTES": row_bytes, "VEC": vec}
    return Build.of(f"store/store_{version}.cu", f"store_{version}", ID_T=ID_CTYPES[id_bytes], **macros)


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    build = _build("v1", _row_bytes(dtype, shape), shape["vec"], shape["id_bytes"])
    return prepare(build, device, check.num_blocks(shape["tokens"] * 32, 128), 128, pdl=False)


def _v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = _row_bytes(dtype, shape)
    lanes, work, pieces = check.split_row(row_bytes // shape["vec"], config.work)
    build = _build("v2", row_bytes, shape["vec"], shape["id_bytes"], LANES=lanes, WORK=work)
    blocks = check.num_blocks(shape["tokens"] * 2 * pieces * lanes, config.threads)
    return prepare(build, device, blocks, config.threads, config.pdl)


def _reference(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    valid = (slots >= 0) & (slots < k_cache.shape[0])
    k_cache[slots[valid].long()] = k[valid]
    v_cache[slots[valid].long()] = v[valid]


def _library(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)


def random_slots(shape: Shape, device: torch.device, generator: torch.Generator, copies: int) -> Tensor:
    """[copies, T] slots, distinct within a copy, in random order; every `skip`-th is -1."""
    tokens, total = shape["tokens"], shape["slots"]
    order = torch.randperm(total, device=device, generator=generator)
    starts = torch.arange(copies, device=device)[:, None] * tokens
    slots = order[(starts + torch.arange(tokens, device=device)) % total]
    if "skip" in shape:
        slots[:, :: shape["skip"]] = -1
    return slots.to(torch.int64 if shape.get("id_bytes", 8) == 8 else torch.int32)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    tokens, heads, dim, pad = shape["tokens"], shape["heads"], shape["head_dim"], shape.get("pad", 0)
    caches = [torch.empty(shape["slots"], heads, dim, dtype=dtype, device=device) for _ in range(2)]
    qkv = torch.randn(copies, tokens, 2 * heads * dim + pad, dtype=dtype, device=device, generator=generator)
    k, v = qkv[..., : 2 * heads * dim].view(copies, tokens, 2, heads, dim).unbind(2)
    slots = random_slots(shape, device, generator, copies)
    return [(*caches, k[i], v[i], slots[i]) for i in range(copies)]


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return shape["tokens"] * (4 * _row_bytes(dtype, shape) + shape.get("id_bytes", 8)), 0


_QWEN = {"heads": 8, "head_dim": 128, "slots": 262_144}
SPEC = register(
    KernelSpec(
        name="store",
        run=store,
        reference=_reference,
        library=_library,
        versions=(
            Version("v2", "cuda", lambda *_: None, _v2, (_build("v2", 2048, 16, 8, LANES=32, WORK=2),)),
            Version("v1", "cuda", lambda *_: None, _v1, (_build("v1", 2048, 16, 8),)),
        ),
        sizes=("tokens", "heads", "head_dim", "vec", "id_bytes"),
        inputs=_inputs,
        outputs=(0, 1),
        updated=(),
        cost=_cost,
        tolerance=dict.fromkeys(FLOATS, 0.0),
        cases=(
            {"tokens": 1, "heads": 8, "head_dim": 128, "slots": 40},
            {"tokens": 77, "heads": 3, "head_dim": 64, "slots": 100, "pad": 192, "id_bytes": 4},
            {"tokens": 9, "heads": 1, "head_dim": 80, "slots": 33, "skip": 2},
            {"tokens": 5, "heads": 3, "head_dim": 5, "slots": 8, "pad": 3, "skip": 3, "id_bytes": 4},
            {"tokens": 200, "heads": 2, "head_dim": 256, "slots": 999, "skip": 1},
            {"tokens": 0, "heads": 2, "head_dim": 64, "slots": 4},
        ),
        bench=tuple({"tokens": n, **_QWEN} for n in (1, 64, 256, 1024, 4096, 16384)),
        tunable=tuple({"tokens": 4**n, **_QWEN} for n in range(8)),
        configs=tuple(Config(threads, work) for threads in (64, 128, 256) for work in (1, 2, 4)),
    )
)
