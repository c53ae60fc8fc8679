"""One decode step at a given batch and context: what each operator and kernel takes, and what it would have to.

A kernel's time is its own (`spans.exclusive`): where the next one begins before it ends, as with programmatic dependent
launch, the overlap counts once. So kernels and gaps add up to the step.
"""

from __future__ import annotations

import random
import statistics
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.profiling.decode_costs import OperatorCost, decode_costs
from minisgl.profiling.roofline import floor
from minisgl.profiling.served import EngineCapture, route
from minisgl.profiling.settled import only_decodes
from minisgl.profiling.spans import Span, exclusive
from minisgl.profiling.timeline import partition
from minisgl.timing import span
from minisgl.types import ConfigError, SamplingParams

WARM_UP = 4  # decode steps before any is measured
FETCH = "Memcpy DtoH"  # begins the name of what ends a step without graphs: its tokens go to the host
_INPUTS = ("step", "decode", "prepare", "forward")  # kernels in these, and in no operator, make the step's inputs


@dataclass(frozen=True, slots=True)
class Used:
    """Own time of one kernel, or on a CPU of one operator, in a step."""

    operator: str
    kernel: str
    calls: float
    us: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A decode step, the mean of several. Times in microseconds; `plain_us` is the median without a profiler."""

    step_us: float
    plain_us: float
    gaps_us: float
    context: float  # tokens of a request, the mean
    used: list[Used]
    costs: dict[str, OperatorCost]
    route: str


def engine_for(config: EngineConfig, batch: int, context: int, steps: int) -> EngineConfig:
    """`config` with room for `batch` requests of `context` tokens that go on for `steps`, where it leaves that open."""
    tokens = config.max_batched_tokens or max(2048, batch)
    length = context + total_steps(batch, context, steps, tokens) + 1
    pages = -(-length // config.page_size) * batch + batch
    return replace(
        config,
        num_pages=config.num_pages or pages,
        max_running=config.max_running or batch,
        cuda_graph_max_batch=config.cuda_graph_max_batch or batch,
        max_batched_tokens=tokens,
        prefix_cache=False,
    )


def total_steps(batch: int, context: int, steps: int, budget: int) -> int:
    """Steps in which a request decodes, at most: while others begin, then to warm up, to measure and to compare."""
    return -(-batch * context // budget) + 2 * steps + 3 * WARM_UP + 4


def measure(engine: Engine, batch: int, context: int, steps: int) -> StepProfile:
    """Runs `batch` random prompts of `context` tokens, then decodes: first as ever, then for the profiler.

    Raises:
        ConfigError: they don't fit into the engine.
    """
    _fill(engine, batch, context, steps)
    _steps(engine, WARM_UP)
    plain = _steps(engine, steps)
    spans = _captured(engine, steps)
    if engine.runner.graphs is not None:
        graphs, engine.runner.graphs = engine.runner.graphs, None
        reference = _captured(engine, 1)
        engine.runner.graphs = graphs
        spans = name_graph_kernels(spans, reference)
    seen = statistics.mean(len(r.tokens) for r in engine.scheduler.requests.values())
    costs = decode_costs(engine, batch, round(seen))
    return profile_of(spans, statistics.median(plain), seen, costs, route(engine))


def _fill(engine: Engine, batch: int, context: int, steps: int) -> None:
    """Queues the requests and runs steps until all of them decode."""
    assert engine.config.max_running is not None and engine.config.max_batched_tokens is not None
    further = total_steps(batch, context, steps, engine.config.max_batched_tokens)
    if engine.max_total_tokens <= context + further or engine.config.max_running < batch:
        raise ConfigError(
            f"{batch} requests of {context} tokens and {further} more don't fit; the engine takes "
            f"{engine.config.max_running} requests of {engine.max_total_tokens} tokens"
        )
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=further, ignore_eos=True).resolve({}, ())
    for i in range(batch):
        engine.add(f"step-{i}", array("i", (rng.randrange(engine.vocab_size) for _ in range(context))), params)
    while not only_decodes(engine.scheduler) or not all(r.num_output for r in engine.scheduler.requests.values()):
        engine.step()
        if len(engine.scheduler.requests) < batch:
            raise ConfigError(f"{batch} requests of {context} tokens don't fit at once; raise --num-pages")


def _steps(engine: Engine, count: int) -> list[float]:
    """Microseconds of each of `count` steps."""
    times = []
    for _ in range(count):
        began = time.perf_counter_ns()
        with span("step"):
            engine.step()
        times.append((time.perf_counter_ns() - began) / 1e3)
    return times


def _captured(engine: Engine, count: int) -> list[Span]:
    """Spans and kernels of `count` steps, after some that settle the profiler."""
    capture = EngineCapture(engine)
    capture.start()
    _steps(engine, WARM_UP)
    began = time.perf_counter_ns()
    _steps(engine, count)
    spans, _ = capture.stop()
    return [s for s in spans if s.start >= began]


# -- what was seen -------------------------------------------------------------------------------------------------


def operator(kernel: Span) -> str:
    """The operator that a kernel belongs to, by the spans around its launch."""
    inner = kernel.path[-1] if kernel.path else "step"
    first = inner.split()[0]
    return "step inputs" if first in _INPUTS else "layer" if first == "layer" else inner


def name_graph_kernels(spans: Sequence[Span], reference: Sequence[Span]) -> list[Span]:
    """Gives the kernels of CUDA graphs the paths of the same step without a graph.

    A graph is launched as a whole, so that its kernels' own paths end at the launch. It holds the kernels that the
    step launches without it, in the same order, with some others around: the two lists of names are aligned.

    Args:
        reference: of one step or more without graphs.
    """
    known = max(_until_fetch(_kernels(reference)), key=len, default=[])
    found = [s for s in spans if s.process != "gpu"]
    for step, like in _beside(_kernels(spans), known):
        paths = {i: s.path for i, s in enumerate(step)}
        matcher = SequenceMatcher(None, [s.name for s in like], [s.name for s in step], autojunk=False)
        for theirs, ours, size in matcher.get_matching_blocks():
            paths |= {ours + i: like[theirs + i].path for i in range(size)}
        found += [replace(s, path=paths[i]) for i, s in enumerate(step)]
    return found


def _kernels(spans: Sequence[Span]) -> list[Span]:
    return sorted((s for s in spans if s.process == "gpu"), key=lambda s: s.start)


def _until_fetch(kernels: Sequence[Span]) -> list[list[Span]]:
    """Split where a step's tokens go to the host."""
    groups: list[list[Span]] = [[]]
    for kernel in kernels:
        groups[-1].append(kernel)
        if kernel.name.startswith(FETCH):
            groups.append([])
    return groups if groups[-1] else groups[:-1]


def _beside(kernels: Sequence[Span], known: Sequence[Span]) -> list[tuple[list[Span], list[Span]]]:
    """Pieces of `kernels`, a step long each, with the kernels of `known` that run meanwhile.

    Graphs pass their tokens on by other means than a copy, so a piece begins with a kernel that a step has once.
    """
    times, here = Counter(s.name for s in known), Counter(s.name for s in kernels)
    at = max((i for i, s in enumerate(known) if times[s.name] == 1), key=lambda i: here[known[i].name], default=0)
    begins = [i for i, s in enumerate(kernels) if known and s.name == known[at].name]
    turned = [*known[at:], *known[:at]]
    ends = [*begins[1:], len(kernels)]
    before = list(kernels[: begins[0]] if begins else kernels), list(known)
    return [before, *((list(kernels[i:j]), turned) for i, j in zip(begins, ends, strict=False))]


def profile_of(
    spans: Sequence[Span], plain_us: float, context: float, costs: dict[str, OperatorCost], route: str
) -> StepProfile:
    """The mean step of captured ones.

    Args:
        spans: of whole steps: engine spans, and kernels where there is a GPU.
    """
    steps = [s for s in spans if s.name == "step"]
    start, end = min(s.start for s in steps), max(s.end for s in steps)
    kernels = [s for s in exclusive(spans) if s.process == "gpu" and s.start < end]  # the step in flight comes after
    if kernels:
        kernels = [replace(s, start=max(s.start, start), end=max(min(s.end, end), start)) for s in kernels]
        used = _sum((operator(s), s.name, s.us) for s in kernels)
        gaps = (end - start) / 1e3 - sum(u.us for u in used)
    else:
        pieces = partition(spans, start, end, end)
        calls = {name: sum(s.name == name for s in spans) for name in {p.name for p in pieces}}
        by = route.partition(",")[0]
        used = _sum((p.name, by if p.name in costs else "host", p.us) for p in pieces if p.category != "gap")
        used = [replace(u, calls=calls[u.operator]) for u in used]
        gaps = sum(p.us for p in pieces if p.category == "gap")
    count = len(steps)
    used = [replace(u, calls=round(u.calls / count, 2), us=u.us / count) for u in used]
    return StepProfile((end - start) / 1e3 / count, plain_us, gaps / count, context, used, costs, route)


def _sum(found: Iterable[tuple[str, str, float]]) -> list[Used]:
    total: dict[tuple[str, str], Used] = {}
    for name, kernel, us in found:
        before = total.get((name, kernel), Used(name, kernel, 0, 0.0))
        total[name, kernel] = replace(before, calls=before.calls + 1, us=before.us + us)
    return list(total.values())


def rows(profile: StepProfile, ceilings: Mapping[str, float], on_gpu: bool, rate: str) -> list[dict[str, Any]]:
    """As step.json has them, the longest operator first.

    Bytes, floor and fraction are an operator's: they stand with its longest kernel, and the fraction is of all its
    kernels' time. Others have None there. A call of an operator can't be faster than a launch, on a GPU.
    """
    limits = {k: v for k, v in ceilings.items() if on_gpu or k != "call_us"}  # one C++ call runs all of them
    operators: dict[str, list[Used]] = {}
    for u in profile.used:
        operators.setdefault(u.operator, []).append(u)
    found: list[dict[str, Any]] = []
    for name, group in sorted(operators.items(), key=lambda item: -sum(u.us for u in item[1])):
        cost = profile.costs.get(name)
        for i, u in enumerate(sorted(group, key=lambda u: -u.us)):
            row: dict[str, Any] = {"operator": name, "kernel": u.kernel, "calls": u.calls, "us": round(u.us, 3)}
            row |= {"bytes": None, "floor_us": None, "limit": None, "fraction": None}
            if i == 0 and cost is not None:
                memory = "HBM" if on_gpu else "cpu"
                least = floor(cost.bytes / cost.calls, cost.flops / cost.calls, limits, memory, rate)  # type: ignore[arg-type]
                total = sum(u.us for u in group)
                row |= {"bytes": cost.bytes, "floor_us": round(least.us * cost.calls, 3), "limit": least.limit}
                row["fraction"] = round(least.us * cost.calls / total, 4)
            found.append(row)
    return found
