"""store in the laboratory: its reference, what it is tested and measured with, and its older versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.spec import FLOATS, KernelSpec, Shape, register
from minisgl.kernels.store.ladder import VERSIONS, store_sorted
from minisgl.kernels.store.op import KERNEL, build_for, store
from minisgl.kernels.tuning import Config

ORDERS = ("random", "sequential", "sorted", "paged")  # paged: pages of 16 slots in random order, each in order
PAGE = 16


def _reference(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    valid = (slots >= 0) & (slots < k_cache.shape[0])
    k_cache[slots[valid].long()] = k[valid]
    v_cache[slots[valid].long()] = v[valid]


def _library(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)


def random_slots(shape: Shape, device: torch.device, generator: torch.Generator, copies: int) -> Tensor:
    """[copies, T] slots, distinct within a copy, in the order that `shape["order"]` numbers; every `skip`-th is -1."""
    tokens, total, kind = shape["tokens"], shape["slots"], ORDERS[shape.get("order", 0)]
    starts = torch.arange(copies, device=device)[:, None] * tokens
    places = (starts + torch.arange(tokens, device=device)) % total
    slots = places
    if kind == "paged":
        pages = torch.randperm(total // PAGE, device=device, generator=generator)
        places %= total // PAGE * PAGE
        slots = pages[places // PAGE] * PAGE + places % PAGE
    elif kind != "sequential":
        slots = torch.randperm(total, device=device, generator=generator)[places]
    if kind == "sorted":
        slots = slots.sort(-1).values
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


_QWEN = {"heads": 8, "head_dim": 128, "slots": 262_144}


def _run(*args: Tensor, version: str | None = None, config: Config | None = None) -> None:
    """As `store`, and the version that is more than a launch."""
    if version == "sorted":
        store_sorted(*args)
    else:
        store(*args, version=version, config=config)


SPEC = register(
    KernelSpec(
        name=KERNEL.name,
        run=_run,
        reference=_reference,
        library=_library,
        versions=(*KERNEL.versions, *VERSIONS),
        sizes=KERNEL.sizes,
        inputs=_inputs,
        outputs=(0, 1),
        updated=(),
        cost=KERNEL.cost,
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
        builds=(build_for("v2", 2048, 16, 8, LANES=32, WORK=2),),
    )
)
