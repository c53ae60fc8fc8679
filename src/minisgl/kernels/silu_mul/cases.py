"""silu_mul in the laboratory: its reference, what it is tested and measured with, and its older versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.silu_mul.ladder import VERSIONS
from minisgl.kernels.silu_mul.op import KERNEL, build_for, silu_mul
from minisgl.kernels.spec import KernelSpec, Shape, register
from minisgl.kernels.tuning import Config


def _reference(gate_up: Tensor, out: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    columns, pad = shape["columns"], shape.get("pad", 0)
    size = (copies, shape["tokens"], 2 * columns + pad)
    gate_up = torch.randn(size, dtype=dtype, device=device, generator=generator)[..., : 2 * columns]
    out = torch.empty(copies, shape["tokens"], columns + pad, dtype=dtype, device=device)[..., :columns]
    return [(gate_up[i], out[i]) for i in range(copies)]


_SIZES = ((1, 3072, 0), (67, 1536, 16), (5, 14336, 0), (3, 33, 0), (129, 8, 8), (2, 1, 1), (0, 16, 0))
SPEC = register(
    KernelSpec(
        name=KERNEL.name,
        run=silu_mul,
        reference=_reference,
        library=_reference,
        versions=(*KERNEL.versions, *VERSIONS),
        sizes=KERNEL.sizes,
        inputs=_inputs,
        outputs=(1,),
        updated=(),
        cost=KERNEL.cost,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
        cases=tuple({"tokens": t, "columns": c, "pad": p} for t, c, p in _SIZES),
        bench=tuple({"tokens": n, "columns": 3072} for n in (1, 64, 256, 1024, 4096, 16384)),
        tunable=tuple({"tokens": 4**n, "columns": 3072} for n in range(8)),
        configs=tuple(Config(threads, work) for threads in (64, 128, 256) for work in (1, 2, 4)),
        builds=(
            build_for(torch.bfloat16, 3072, 8, 2),
            build_for(torch.float32, 33, 1, 4),
            build_for(torch.float16, 40, 8, 1),
        ),
    )
)
