"""moe in the laboratory: its reference, and what it is tested and measured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.moe.op import moe
from minisgl.kernels.nvrtc import Capability
from minisgl.kernels.rmsnorm.ladder import triton_fits
from minisgl.kernels.spec import KernelSpec, Run, Shape, Version, register
from minisgl.kernels.tuning import Config


def _run(*args: Any, version: str | None = None, config: Config | None = None) -> None:
    """As `moe`, which has one version and chooses its tiles itself."""
    if version is not None:
        SPEC.version(version)
    moe(*args)


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.moe import triton_v1

    return triton_v1.run


def _reference(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, top_k: int, normalise: bool
) -> None:
    """The definition, a token at a time."""
    shares, chosen = logits.softmax(-1).topk(top_k)
    if normalise:
        shares = shares / shares.sum(-1, keepdim=True)
    for t in range(x.shape[0]):
        gate, up = torch.einsum("eih,h->ei", gate_up[chosen[t]], x[t]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        out[t] = torch.einsum("e,ehi,ei->h", shares[t], down[chosen[t]], inner)


def _fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    if where == (0, 0) and dtype == torch.bfloat16:
        return "Triton's interpreter has no products of bfloat16"
    return triton_fits(where, dtype, shape)


def _library(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, top_k: int, normalise: bool
) -> None:
    """Every expert over every token, the shares of those that weren't chosen zero: what needs no word to the host."""
    shares, chosen = logits.softmax(-1).topk(top_k)
    if normalise:
        shares = shares / shares.sum(-1, keepdim=True)
    every = torch.zeros_like(logits).scatter_(1, chosen, shares).T
    gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, -1)
    by_expert = torch.matmul(torch.nn.functional.silu(gate) * up, down.transpose(1, 2))
    torch.sum(by_expert * every[..., None], 0, out=out)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    """Weights that all calls share, and logits of which no two of a token are alike."""
    tokens, experts, hidden, inner = (shape[n] for n in ("tokens", "experts", "hidden", "inner"))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator).mul_(size[-1] ** -0.5)

    weights, found = (normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)), []
    for _ in range(copies):
        x = torch.randn(tokens, hidden, dtype=dtype, device=device, generator=generator)
        order = torch.rand(tokens, experts, device=device, generator=generator).argsort(-1)
        logits = (order / experts * 6 - 3).to(dtype)
        found.append((x, logits, *weights, torch.empty_like(x), shape["top_k"], bool(shape.get("normalise", 1))))
    return found


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Weights of the experts that tokens choose at random, once each, and the activations."""
    tokens, experts, hidden, inner, top_k = (shape[n] for n in ("tokens", "experts", "hidden", "inner", "top_k"))
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    moved = touched * 3 * inner * hidden + tokens * (2 * hidden + experts)
    return int(moved * dtype.itemsize), 6 * tokens * top_k * inner * hidden


def _case(tokens: int, experts: int, top_k: int, hidden: int, inner: int, **more: int) -> Shape:
    return {"tokens": tokens, "experts": experts, "top_k": top_k, "hidden": hidden, "inner": inner, **more}


SPEC = register(
    KernelSpec(
        name="moe",
        run=_run,
        reference=_reference,
        library=_library,
        versions=(Version("v1", "triton", _fits, _v1),),
        sizes=("tokens", "experts", "top_k", "hidden", "inner"),
        cost=_cost,
        inputs=_inputs,
        outputs=(4,),
        updated=(),
        tolerance={torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3},
        cases=(_case(1, 5, 2, 40, 24), _case(7, 16, 8, 33, 17), _case(9, 3, 3, 64, 96, normalise=0)),
        bench=tuple(_case(n, 128, 8, 2048, 768) for n in (1, 16, 64, 256)),
    )
)
