"""store_norm in the laboratory: is it worth fusing the KV store with the next residual addition and norm?"""

from __future__ import annotations

from typing import Any

import torch

from minisgl.kernels.rmsnorm import cases as norm_cases
from minisgl.kernels.spec import KernelSpec, Shape, register
from minisgl.kernels.store import cases as store_cases
from minisgl.kernels.store_norm.ladder import VERSIONS, fused, separate
from minisgl.kernels.tuning import Config


def _run(*args: Any, version: str | None = None, config: Config | None = None) -> None:
    (fused if version == "fused" else separate)(*args)


def _reference(*args: Any) -> None:
    store_cases.SPEC.reference(*args[:5])
    norm_cases.ADD_SPEC.reference(*args[5:])


def _library(*args: Any) -> None:
    store_cases.SPEC.library(*args[:5])
    norm_cases.ADD_SPEC.library(*args[5:])


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    stored = store_cases.SPEC.inputs(shape, dtype, device, generator, copies)
    normed = norm_cases.ADD_SPEC.inputs(shape, dtype, device, generator, copies)
    return [(*a, *b) for a, b in zip(stored, normed, strict=True)]


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    costs = store_cases.SPEC.cost(shape, dtype), norm_cases.ADD_SPEC.cost(shape, dtype)
    return costs[0][0] + costs[1][0], costs[0][1] + costs[1][1]


def _case(tokens: int, heads: int, head_dim: int, width: int, **more: int) -> Shape:
    return {"tokens": tokens, "heads": heads, "head_dim": head_dim, "width": width, "slots": 2 * tokens + 8, **more}


SPEC = register(
    KernelSpec(
        name="store_norm",
        run=_run,
        reference=_reference,
        library=_library,
        versions=VERSIONS,
        sizes=("tokens", "heads", "head_dim", "width"),
        cost=_cost,
        inputs=_inputs,
        outputs=(0, 1, 9),
        updated=(6,),
        tolerance=norm_cases.ADD_SPEC.tolerance,
        cases=(
            _case(1, 8, 128, 1024),
            _case(37, 3, 64, 576, id_bytes=4),
            _case(9, 1, 80, 80, skip=2),
            _case(5, 8, 128, 4096, pad=64),
            _case(0, 2, 64, 64),
        ),
        bench=tuple({**_case(n, 8, 128, 1024), "slots": 262_144} for n in (1, 64, 256, 1024, 4096)),
    )
)
