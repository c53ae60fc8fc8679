"""sample in the laboratory: its reference, and what it is tested and measured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.rmsnorm.ladder import triton_fits
from minisgl.kernels.sample.noise import gumbel_noise
from minisgl.kernels.sample.op import sample_tokens
from minisgl.kernels.spec import FLOATS, KernelSpec, Run, Shape, Version, register
from minisgl.kernels.tuning import Config


def _run(*args: Any, version: str | None = None, config: Config | None = None) -> None:
    """As `sample_tokens`, which has one version and nothing to configure."""
    if version is not None:
        SPEC.version(version)
    sample_tokens(*args)


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    from minisgl.kernels.sample import triton_v1

    def run(logits: Tensor, temperature: Tensor, seeds: Tensor, index: Tensor, out: Tensor) -> None:
        triton_v1.run(logits, temperature, seeds, index, out, 0, None)

    return run


def scores(logits: Tensor, temperature: Tensor, seeds: Tensor, index: Tensor) -> Tensor:
    """What each token is chosen by, [R, V] float64: its logit, or logit / t + noise."""
    t = temperature.double()[:, None]
    noise = gumbel_noise(seeds, index.long(), logits.shape[1]).double()
    return torch.where(t > 0, logits.double() / t.clamp(min=1e-30) + noise, logits.double())


def reference(logits: Tensor, temperature: Tensor, seeds: Tensor, index: Tensor, out: Tensor) -> None:
    out.copy_(scores(logits, temperature, seeds, index).argmax(-1))


def library(logits: Tensor, temperature: Tensor, seeds: Tensor, index: Tensor, out: Tensor) -> None:
    """The usual way, with noise of torch's own."""
    likely = torch.softmax(logits.float() / temperature.clamp(min=1e-5)[:, None], -1)
    torch.argmax(likely.div_(torch.empty_like(likely).exponential_()), -1, out=out)


def regret(args: tuple[Any, ...], expected: tuple[Any, ...]) -> float:
    """By how much the best token beats the one that was chosen, at most; infinity for one that doesn't exist."""
    logits, temperature, seeds, index, out = args
    if not out.numel():
        return 0.0
    if not bool(((out >= 0) & (out < logits.shape[1])).all()):
        return float("inf")
    of_all = scores(logits, temperature, seeds, index)
    return float((of_all.max(-1).values - of_all.gather(1, out[:, None])[:, 0]).max())


def inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    rows, vocab = shape["tokens"], shape["vocab"]
    found = []
    for _ in range(copies):
        logits = torch.randn(rows, vocab, dtype=dtype, device=device, generator=generator) * 2
        temperature = torch.rand(rows, device=device, generator=generator) + 0.3
        temperature[:: shape.get("greedy", rows + 1)] = 0
        seeds = torch.randint(0, 1 << 62, (rows,), device=device, generator=generator)
        index = torch.randint(0, 4096, (rows,), device=device, generator=generator, dtype=torch.int32)
        found.append((logits, temperature, seeds, index, torch.empty(rows, dtype=torch.int64, device=device)))
    return found


def cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """The logits are read once; Philox and the logarithms are some 60 operations a token."""
    return shape["tokens"] * (shape["vocab"] * dtype.itemsize + 28), shape["tokens"] * shape["vocab"] * 60


CASES: tuple[Shape, ...] = (
    {"tokens": 1, "vocab": 300},
    {"tokens": 5, "vocab": 5000, "greedy": 2},
    {"tokens": 3, "vocab": 4096},
    {"tokens": 9, "vocab": 2, "greedy": 1},
    {"tokens": 0, "vocab": 64},
)
SPEC = register(
    KernelSpec(
        name="sample",
        run=_run,
        reference=reference,
        library=library,
        versions=(Version("v1", "triton", triton_fits, _v1),),
        sizes=("tokens", "vocab"),
        inputs=inputs,
        outputs=(4,),
        updated=(),
        cost=cost,
        tolerance=dict.fromkeys(FLOATS, 1e-4),  # of a score: noise is rounded to float32
        cases=CASES,
        bench=tuple({"tokens": n, "vocab": 151_936} for n in (1, 8, 64, 256)),
        error=regret,
    )
)
