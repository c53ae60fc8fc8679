"""skinny_gemm in the laboratory: its reference, and what it is tested and measured with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minisgl.kernels.rmsnorm.cases import norm as rms_norm
from minisgl.kernels.skinny_gemm.ladder import skinny_gemm, versions
from minisgl.kernels.spec import KernelSpec, Shape, register
from minisgl.kernels.tuning import Config


def reference(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> None:
    """As `skinny_gemm`, on any device."""
    y = (x if norm is None else rms_norm(x, norm, eps)) @ weight.T
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    out.copy_(out + y if add else y)


def library(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> None:
    """The same with torch's norm and matrix product (cuBLAS), an operator each."""
    y = F.linear(x if norm is None else F.rms_norm(x, norm.shape, norm, eps), weight)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    (out.add_ if add else out.copy_)(y)


def _inputs(
    add: bool, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    """Copies share nothing: a model's products have weights of their own."""
    tokens, n, k, pad = shape["tokens"], shape["n"], shape["k"], shape.get("pad", 0)
    width = n // 2 if shape["gated"] else n

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    x = normal(copies, tokens, k + 8 * pad)[..., :k]
    weights = normal(copies, n, k).mul_(k**-0.5)
    gains = normal(copies, k) if shape["norm"] else None
    out = normal(copies, tokens, width + pad)[..., :width]
    options = 1e-6, bool(shape["gated"]), add
    return [(x[i], weights[i], out[i], None if gains is None else gains[i], *options) for i in range(copies)]


def _cost(add: bool, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    tokens, n, k = shape["tokens"], shape["n"], shape["k"]
    width = n // 2 if shape["gated"] else n
    elements = n * k + k * shape["norm"] + tokens * (k + width * (1 + add))
    return elements * dtype.itemsize, 2 * tokens * n * k


def case(tokens: int, n: int, k: int, norm: int = 0, gated: int = 0, **more: int) -> Shape:
    return {"tokens": tokens, "n": n, "k": k, "norm": norm, "gated": gated, **more}


def _spec(add: bool) -> KernelSpec:
    bench = case(1, 1024, 2048) if add else case(1, 4096, 1024, 1)
    own = (
        case(1, 64, 96, 1),
        case(5, 96, 160, 1, 1, pad=1),
        case(64, 48, 1056),
        case(23, 128, 64, 0, 1),
        case(9, 16, 32, 1),
        case(3, 50, 40, 1, pad=1),  # tiles don't fit: Triton serves it
        case(0, 32, 32),
    )
    added = (case(1, 64, 96), case(8, 32, 2080, 1, pad=3), case(17, 112, 32), case(64, 64, 128))
    return KernelSpec(
        name="skinny_gemm_add" if add else "skinny_gemm",
        run=skinny_gemm,
        reference=reference,
        library=library,
        versions=versions(int(add)),
        sizes=("tokens", "n", "k", "norm", "gated"),
        inputs=partial(_inputs, add),
        outputs=() if add else (2,),
        updated=(2,) if add else (),
        cost=partial(_cost, add),
        tolerance={torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3},
        cases=added if add else own,
        bench=tuple({**bench, "tokens": n} for n in (1, 8, 64)),
        configs=tuple(Config(threads, work) for threads in (128, 256, 512) for work in (1, 2, 4)),
    )


SPEC, ADD_SPEC = register(_spec(False)), register(_spec(True))
