"""The experiments behind the rulings: each opens the two arms of a claim at one size and gives what takes a sample.

A sample is a time in microseconds. Arms run the registry's kernels, the tree's comparison, or the engine itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minisgl.hardware import detect
from minisgl.profiling.expected import Arm, Call, Claim
from minisgl.types import MinisglError, SamplingParams

if TYPE_CHECKING:
    from minisgl.llm import LLM

Sampler = Callable[[], float]
Case = Mapping[str, Any]
Experiment = Callable[[Claim, Case], AbstractContextManager[tuple[Sampler, Sampler]]]
DTYPE = torch.bfloat16
_COLLECTIVE_ROUNDS = 20  # as many as any ruling asks for, and more
_COMPARED_NS = 200_000  # of work in a sample of a comparison, which must outlast the clock's resolution


class NotMeasurable(MinisglError):
    """This machine can't answer; the text says what it would take."""


# -- kernels ---------------------------------------------------------------------------------------------------------


@contextmanager
def kernels(claim: Claim, case: Case) -> Iterator[tuple[Sampler, Sampler]]:
    """Calls of registered kernels, replayed from CUDA graphs over data that isn't in the L2 cache."""
    if detect().cuda is None:
        raise NotMeasurable(f"it takes an NVIDIA GPU: {detect().no_cuda_reason}")
    yield _kernel_arm(claim.a, case), _kernel_arm(claim.b, case)
    torch.cuda.empty_cache()


def _kernel_arm(arm: Arm, case: Case) -> Sampler:
    from minisgl.profiling.replay import replayer

    calls = [_bound_calls(call, case) for call in arm.calls]
    for bound in calls:
        bound[0]()  # compiles what a capture can't
    rounds = min(len(bound) for bound in calls)
    take = replayer([bound[i] for i in range(rounds) for bound in calls])
    return lambda: take() * len(calls)


def _bound_calls(call: Call, case: Case) -> list[Callable[[], object]]:
    from minisgl.kernels.spec import registry
    from minisgl.kernels.store.cases import ORDERS
    from minisgl.kernels.tuning import choose
    from minisgl.profiling.replay import cold_copies, rotated_inputs

    spec = registry().get(call.kernel)
    if spec is None:
        raise NotMeasurable(f"there is no kernel {call.kernel}")
    shape = {**spec.bench[0], **case, **call.case}
    if isinstance(order := shape.get("order"), str):
        shape["order"] = ORDERS.index(order)
    options: dict[str, Any] = {"version": call.version} if call.version else {}
    changes = {name: getattr(call, name) for name in ("threads", "work", "pdl") if getattr(call, name) is not None}
    if changes:
        options["config"] = dataclasses.replace(choose(spec.name, 0, spec.cost(shape, DTYPE)[0]), **changes)
    inputs = rotated_inputs(spec, shape, DTYPE, cold_copies(spec, shape, DTYPE, most=1024))
    return [lambda args=args: spec.run(*args, **options) for args in inputs]  # type: ignore[misc]


# -- the prefix comparison -------------------------------------------------------------------------------------------


@contextmanager
def compare(claim: Claim, case: Case) -> Iterator[tuple[Sampler, Sampler]]:
    """Ways of comparing two runs of token ids, timed inside the C++ extension."""
    try:
        from minisgl import _C
    except ImportError:
        raise NotMeasurable("it takes the C++ extension: install a C++20 compiler and reinstall minisgl") from None
    ids = int(case["ids"])

    def arm(name: str) -> Sampler:
        try:
            once = max(_C.compare_ns(name, ids, 1000), 0.1)
        except ValueError as error:
            raise NotMeasurable(str(error)) from None
        return lambda: _C.compare_ns(name, ids, int(_COMPARED_NS / once) + 1) / 1e3

    yield arm(claim.a.path), arm(claim.b.path)


# -- collectives -----------------------------------------------------------------------------------------------------


@contextmanager
def collective(claim: Claim, case: Case) -> Iterator[tuple[Sampler, Sampler]]:
    """Paths of an all-reduce between GPUs: ranks of their own take the samples, in turns, before this yields."""
    from minisgl.profiling.collective_arms import times
    from minisgl.profiling.comm import default_world
    from minisgl.profiling.ranks import run_ranks

    found = torch.cuda.device_count()
    if found < 2:
        raise NotMeasurable(f"it takes two NVIDIA GPUs; this machine has {found}")
    arms, world = (claim.a.path, claim.b.path), default_world()
    measured = run_ranks(world, "cuda", times, arms, case["bytes"], _COLLECTIVE_ROUNDS)[0]
    if measured is None:
        raise NotMeasurable(f"these GPUs have no path {arms[0]} or {arms[1]} for {case['bytes']} bytes")
    a, b = (iter(samples) for samples in measured)
    yield lambda: float(next(a)), lambda: float(next(b))


# -- the engine ------------------------------------------------------------------------------------------------------


@contextmanager
def engine(claim: Claim, case: Case) -> Iterator[tuple[Sampler, Sampler]]:
    """Engines with random weights that answer prompts which share nothing; the wall time of all answers."""
    from minisgl.llm import LLM
    from minisgl.profiling.shapes import shape_folder

    shape = "smollm2" if detect().cuda is None else "qwen3-0.6b"
    with shape_folder(shape) as folder:
        common: dict[str, Any] = {"dummy_weights": True, "num_pages": 128, "max_running": 16, "max_model_len": 1024}
        llms = [LLM(str(folder), **common, **arm.options) for arm in (claim.a, claim.b)]
        seeds = count()
        yield _engine_arm(llms[0], case, seeds), _engine_arm(llms[1], case, seeds)


def _engine_arm(llm: LLM, case: Case, seeds: Iterator[int]) -> Sampler:
    params = SamplingParams(max_tokens=case["output"], temperature=0, ignore_eos=True)

    def sample() -> float:
        rng = np.random.default_rng(next(seeds))
        prompts = rng.integers(0, 10_000, (case["requests"], case["prompt"])).tolist()
        began = time.perf_counter()
        llm.generate(prompts, params)
        return (time.perf_counter() - began) * 1e6

    return sample


EXPERIMENTS: dict[str, Experiment] = {
    "kernels": kernels,
    "compare": compare,
    "collective": collective,
    "engine": engine,
}
