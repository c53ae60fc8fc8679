"""A kernel against its reference: random inputs, poisoned outputs, the reference in float64.

Tests and `minisgl profile kernels` share this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.spec import KernelSpec, Shape

POISON = -123_456_789  # in outputs of whole numbers; NaN in others


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one call went. `problem` is None where all is well, else what is wrong."""

    error: float  # the largest of the outputs
    tolerance: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


def verify(
    spec: KernelSpec,
    call: Callable[..., object],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    slack: float = 1.0,
) -> Outcome:
    """Runs `call` on inputs drawn with `seed` and compares all that it may write with the reference.

    Args:
        slack: factor on the tolerance, for an interpreter that rounds worse than the hardware.

    Returns:
        The outcome. A problem is an error above the tolerance, an element written that shouldn't be, or not written.
    """
    args = spec.inputs(shape, dtype, device, torch.Generator(device).manual_seed(seed), 1)[0]
    outputs = [i for i in spec.outputs if i < len(args)]
    for i in outputs:
        poison(_whole(args[i]))
    expected = precise(args)
    spec.reference(*expected)
    call(*args)
    tolerance = slack * spec.tolerance[dtype]
    if spec.error is not None:
        error = spec.error(args, expected)
        return Outcome(error, tolerance, None if error <= tolerance else f"error {error:.3g} over {tolerance:.3g}")
    compared = {i: compare(args[i], expected[i]) for i in (*outputs, *spec.updated)}
    problems = [f"argument {i}: {_complaint(e, tolerance)}" for i, e in compared.items() if e is None or e > tolerance]
    problems += [f"argument {i}: written outside of its rows" for i in outputs if _wrote_outside(args[i])]
    error = max((e for e in compared.values() if e is not None), default=0.0)
    return Outcome(error, tolerance, "; ".join(problems) or None)


def _complaint(error: float | None, tolerance: float) -> str:
    return (
        "written where nothing belongs, or not written" if error is None else f"error {error:.3g} over {tolerance:.3g}"
    )


def poison(x: Tensor) -> None:
    """Fills `x` with what no kernel writes."""
    x.fill_(float("nan") if x.is_floating_point() else POISON)


def precise(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the floating-point tensors in float64; clones of the other tensors."""
    return tuple((a.double() if a.is_floating_point() else a.clone()) if isinstance(a, Tensor) else a for a in args)


def compare(out: Tensor, expected: Tensor) -> float | None:
    """‖out − expected‖ / ‖expected‖ of what was written; None if that isn't what should have been."""
    skipped = _poisoned(expected)
    if not torch.equal(_poisoned(out), skipped):
        return None
    difference = (out.double()[~skipped] - expected.double()[~skipped]).norm().item()
    return difference / expected.double()[~skipped].norm().item() if difference else 0.0


def _whole(x: Tensor) -> Tensor:
    """Everything in the memory that `x` is a part of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def _poisoned(x: Tensor) -> Tensor:
    return x.isnan() if x.is_floating_point() else x == POISON


def _wrote_outside(x: Tensor) -> bool:
    whole = _whole(x)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return not bool(_poisoned(whole[~inside]).all())
