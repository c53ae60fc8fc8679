"""The experiments behind the rulings: each opens the two arms of a claim at one size and gives what takes a sample.

A sample is a time in microseconds. Arms run the registry's kernels, the tree's comparison, or the engine itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from minisgl.hardware import detect
from minisgl.profiling.expected import Arm, Call, Claim
from minisgl.types import MinisglError, SamplingParams

if TYPE_CHECKING:
    from minisgl.cache.prefix import PrefixCache

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


class Stopwatch:
    """Stands in for an object and adds up the time that its methods take, the watch's own included."""

    def __init__(self, inner: object) -> None:
        self.inner, self.ns = inner, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def timed(*args: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return found(*args)
            finally:
                self.ns += time.perf_counter_ns() - began

        return timed


@contextmanager
def critical_path(claim: Claim, case: Case) -> Iterator[tuple[Sampler, Sampler]]:
    """An engine with random weights answers prompts that share nothing; A: the whole time, B: less that in the tree.

    Both are of the same run, so noise falls on both alike. Overlap may hide the tree's time: this is the most it costs.
    """
    from minisgl.llm import LLM
    from minisgl.profiling.shapes import shape_folder

    with shape_folder("smollm2" if detect().cuda is None else "qwen3-0.6b") as folder:
        llm = LLM(str(folder), dummy_weights=True, num_pages=128, max_running=16, max_model_len=1024)
    ledger = llm.engine.scheduler.ledger
    watch = Stopwatch(ledger.cache)
    ledger.cache = cast("PrefixCache", watch)
    params, seeds = SamplingParams(max_tokens=case["output"], temperature=0, ignore_eos=True), count()
    waiting: tuple[deque[float], deque[float]] = deque(), deque()

    def sample(arm: int) -> float:
        if not waiting[arm]:
            prompts = np.random.default_rng(next(seeds)).integers(0, 10_000, (case["requests"], case["prompt"]))
            watch.ns, began = 0, time.perf_counter_ns()
            llm.generate(prompts.tolist(), params)
            whole = time.perf_counter_ns() - began
            waiting[0].append(whole / 1e3)
            waiting[1].append((whole - watch.ns) / 1e3)
        return waiting[arm].popleft()

    yield lambda: sample(0), lambda: sample(1)


EXPERIMENTS: dict[str, Experiment] = {
    "kernels": kernels,
    "compare": compare,
    "collective": collective,
    "critical path": critical_path,
}
