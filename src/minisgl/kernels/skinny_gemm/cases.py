"""skinny_gemm in the laboratory: its reference, what it is tested and measured with, and its older versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minisgl.kernels.nvrtc import Build
from minisgl.kernels.rmsnorm.cases import norm as rms_norm
from minisgl.kernels.skinny_gemm.ladder import VERSIONS
from minisgl.kernels.skinny_gemm.op import KERNEL, build_for, skinny_gemm
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
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
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
    options = 1e-6, bool(shape["gated"]), bool(shape["add"])
    return [(x[i], weights[i], out[i], None if gains is None else gains[i], *options) for i in range(copies)]


def case(tokens: int, n: int, k: int, norm: int = 0, gated: int = 0, add: int = 0, pad: int = 0) -> Shape:
    return {"tokens": tokens, "n": n, "k": k, "norm": norm, "gated": gated, "add": add, "pad": pad}


def _spec(name: str, bench: Shape, cases: tuple[Shape, ...], builds: tuple[Build, ...] = ()) -> KernelSpec:
    add = bench["add"]
    return KernelSpec(
        name=name,
        run=skinny_gemm,
        reference=reference,
        library=library,
        versions=(*KERNEL.versions, *VERSIONS),
        sizes=KERNEL.sizes,
        inputs=_inputs,
        outputs=() if add else (2,),
        updated=(2,) if add else (),
        cost=KERNEL.cost,
        tolerance={torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3},
        cases=cases,
        bench=tuple({**bench, "tokens": n} for n in (1, 8, 64)),
        configs=tuple(Config(threads, work) for threads in (128, 256, 512) for work in (1, 2, 4, 8)),
        builds=builds,
    )


_BUILDS = (
    build_for(torch.bfloat16, case(1, 6144, 1024, 1, 1), 16, 8, 2),
    build_for(torch.bfloat16, case(8, 24576, 4096, 1, 1), 8, 4, 3),
    build_for(torch.bfloat16, case(8, 1024, 3072, add=1), 16, 1, 4),
    build_for(torch.float16, case(32, 4096, 4096), 8, 2, 1),
    build_for(torch.bfloat16, case(16, 960, 576, 1), 4, 4, 1, 0),
)
SPEC = register(
    _spec(
        KERNEL.name,
        case(1, 4096, 1024, 1),
        (
            case(1, 64, 96, 1),
            case(5, 96, 160, 1, 1, pad=1),
            case(64, 48, 1056),
            case(23, 128, 64, 0, 1),
            case(9, 16, 32, 1),
            case(3, 50, 40, 1, pad=1),  # tiles don't fit: Triton serves it
            case(0, 32, 32),
        ),
        _BUILDS,
    )
)
ADD_SPEC = register(
    _spec(
        "skinny_gemm_add",
        case(1, 1024, 2048, add=1),
        (
            case(1, 64, 96, add=1),
            case(8, 32, 2080, 1, add=1, pad=3),
            case(17, 112, 32, add=1),
            case(64, 64, 128, add=1),
        ),
    )
)
