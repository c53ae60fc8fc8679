"""rmsnorm and add_rmsnorm in the laboratory: references, and what they are tested and measured with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.rmsnorm.ladder import VERSIONS
from minisgl.kernels.rmsnorm.op import ADD_KERNEL, KERNEL, add_rmsnorm, build_for, rmsnorm
from minisgl.kernels.spec import Kernel, KernelSpec, Shape, register
from minisgl.kernels.tuning import Config


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in x's own precision."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _reference(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(norm(x, weight, eps))


def _add_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    residual += x
    out.copy_(norm(residual, weight, eps))


def _library(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(torch.nn.functional.rms_norm(x, weight.shape, weight, eps))


def _add_library(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    residual += x
    out.copy_(torch.nn.functional.rms_norm(residual, weight.shape, weight, eps))


def _inputs(
    add: bool, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    width, pad = shape["width"], shape.get("pad", 0)
    size = (copies, shape["tokens"], width + pad)
    x, residual = (torch.randn(size, dtype=dtype, device=device, generator=generator)[..., :width] for _ in range(2))
    weight = torch.randn(width, dtype=dtype, device=device, generator=generator)
    out = torch.empty(size, dtype=dtype, device=device)[..., :width]
    return [(x[i], *((residual[i],) if add else ()), weight, 1e-6, out[i]) for i in range(copies)]


def _spec(kernel: Kernel, add: int) -> KernelSpec:
    sizes: tuple[tuple[int, int, int], ...] = (
        (1, 1024, 0), (5, 4096, 0), (67, 128, 0), (300, 576, 64), (9, 577, 0), (33, 80, 8), (3, 8192, 0), (3, 9, 1),
        (2, 3, 0), (0, 64, 0),
    )  # fmt: skip
    builds = tuple(
        build_for(add, dtype, width, vec, row_threads)
        for dtype, width, vec, row_threads in (
            (torch.bfloat16, 1024, 8, 128),
            (torch.float16, 128, 8, 16),
            (torch.float32, 4096, 4, 512),
            (torch.bfloat16, 577, 1, 96),
        )
    )
    return KernelSpec(
        name=kernel.name,
        run=add_rmsnorm if add else rmsnorm,
        reference=_add_reference if add else _reference,
        library=_add_library if add else _library,
        versions=(*kernel.versions, *VERSIONS),
        sizes=kernel.sizes,
        cost=kernel.cost,
        inputs=partial(_inputs, bool(add)),
        outputs=(4,) if add else (3,),
        updated=(1,) if add else (),
        tolerance={torch.float32: 2e-6, torch.bfloat16: (1 + add) * 4e-3, torch.float16: (1 + add) * 5e-4},  # roundings
        cases=tuple({"tokens": t, "width": w, "pad": p} for t, w, p in sizes),
        bench=tuple({"tokens": n, "width": 1024} for n in (1, 64, 256, 1024, 4096, 16384)),
        tunable=tuple({"tokens": 4**n, "width": 1024} for n in range(8)),
        builds=builds,
        configs=tuple(Config(threads, work) for threads in (128, 256) for work in (1, 2, 4)),
    )


SPEC, ADD_SPEC = register(_spec(KERNEL, 0)), register(_spec(ADD_KERNEL, 1))
