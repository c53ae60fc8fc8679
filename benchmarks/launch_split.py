"""Where the host's time goes when it launches a decode step: the part `launch` of bench_gpu.py. Microseconds, medians.

Each piece is timed where the engine calls it, once with the GPU idle (`idle`) and once behind the step before, as when
steps overlap (`behind`): a driver's call may wait for room in a queue then.

    slot      of pinned memory for the graph's input, waiting for its last use      words   of the batch, put there
    replay    the graph's launch                                                    event   recorded behind it
    rest      of the whole launch

Beside it what such calls cost by themselves: graphs of empty kernels, with programmatic dependent launch and without;
the step as one graph and as two; copies, events and pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from common import spread

from minisgl.engine.engine import Engine
from minisgl.engine.graphs import Captured, captured
from minisgl.kernels import nvrtc
from minisgl.profiling.ceilings import EMPTY
from minisgl.timing import collector_off

PIECES = ("slot", "words", "replay", "event")
CHAIN = (1, 100, 300)  # kernels of a graph
REPEATS = 40


class Stopwatch:
    """Microseconds of every call of the functions that it wraps."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        found = self.times.setdefault(name, [])

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **options)
            found.append((time.perf_counter() - began) * 1e6)
            return result

        return timed

    def medians(self) -> dict[str, float]:
        return {name: _median(found) for name, found in self.times.items() if found}


def _median(times: list[float]) -> float:
    return round(spread(times)["median"], 1)


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def watched(places: list[tuple[Any, str, str]]) -> Iterator[Stopwatch]:
    """Functions under a stopwatch: for each who has it, its name there, and the name of its times."""
    watch = Stopwatch()
    with ExitStack() as stack:
        for owner, attribute, name in places:
            stack.enter_context(patch.object(owner, attribute, watch.wrap(name, getattr(owner, attribute))))
        yield watch


def _launch(engine: Engine) -> list[tuple[Any, str, str]]:
    """Where a launch and its pieces are."""
    runner = engine.runner
    places: list[tuple[Any, str, str]] = [(runner, "launch", "launch")]
    if runner.graphs is not None:
        mail = runner.graphs.mail
        places += [
            (runner.graphs.state, "decode_words", "words"),
            (mail, "next_words", "slot"),
            (mail, "tokens", "event"),
        ]
        places += [(step.plain, "replay", "replay") for step in runner.graphs._steps.values()]
    return places


def pieces(engine: Engine, steps: int, behind: bool) -> dict[str, float]:
    """Of the launches of `steps` decode steps of what runs in `engine`, nothing in flight."""
    handles = []
    with watched(_launch(engine)) as watch:
        for _ in range(steps):
            handles.append(engine.runner.launch(engine.scheduler.schedule()))
            if not behind:
                _sync()
            if len(handles) > behind:
                engine._collect(handles.pop(0))
    for handle in handles:
        engine._collect(handle)
    found = watch.medians()
    return found | {"rest": round(found["launch"] - sum(found.get(name, 0.0) for name in PIECES), 1)}


def _replays(graph: torch.cuda.CUDAGraph) -> dict[str, float]:
    """A replay's host time while the GPU has nothing to do, and while it runs the replay before."""
    idle, behind = Stopwatch(), Stopwatch()
    for _ in range(REPEATS):
        _sync()
        idle.wrap("us", graph.replay)()
        behind.wrap("us", graph.replay)()
    _sync()
    return {"idle": idle.medians()["us"], "behind": behind.medians()["us"]}


def chains() -> list[dict[str, Any]]:
    """Graphs of empty kernels, one after another."""
    rows = []
    for pdl in (False, True):
        run = nvrtc.prepare(EMPTY, 0, 1, 32, pdl)
        run()
        for count in CHAIN:
            graph, _ = captured(partial(_times, count, run), None)
            rows.append({"kernels": count, "pdl": pdl} | _replays(graph))
    return rows


def _times(count: int, run: Callable[[], None]) -> None:
    for _ in range(count):
        run()


@torch.inference_mode()
def one_or_two(engine: Engine) -> dict[str, Any]:
    """The largest step as the engine has it, and as two graphs, the second of which samples. Only dummies take part."""
    graphs = engine.runner.graphs
    assert graphs is not None
    whole: Captured = graphs._steps[graphs.max_batch, graphs.widths[0]]
    step, pool = whole.step, whole.plain.pool()
    graphs.mail.reset(step.size)
    forward, logits = captured(step.forward, pool)
    sampler, _ = captured(partial(step.sample, logits, False), pool)
    found = {"one": whole.plain, "forward": forward, "sampler": sampler}
    row = {"batch": step.size} | {name: _replays(graph) for name, graph in found.items()}
    graphs.mail.reset()
    return row


def calls() -> dict[str, float]:
    """Single calls, on an idle GPU."""
    pinned = torch.zeros(768, dtype=torch.int32, pin_memory=True)
    device = torch.zeros(768, dtype=torch.int32, device="cuda")
    event = torch.cuda.Event()

    def fresh_event() -> None:
        torch.cuda.Event().record()

    def inference_mode() -> None:
        with torch.inference_mode():
            pass

    watch = Stopwatch()
    timed = {
        "copy to device": lambda: device.copy_(pinned, non_blocking=True),
        "copy to host": lambda: pinned.copy_(device, non_blocking=True),
        "event record": event.record, "event wait, done": event.synchronize, "new event": fresh_event,
        "pinned memory": lambda: torch.empty(256, dtype=torch.int64, pin_memory=True).copy_(device[:256]),
        "inference mode": inference_mode, "kernel": lambda: device.add_(1),
    }  # fmt: skip
    for name, call in timed.items():
        run = watch.wrap(name, call)
        for _ in range(REPEATS):
            _sync()
            run()
    return watch.medians()


def controls(engine: Engine) -> dict[str, Any]:
    """What such calls cost by themselves; of nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    with collector_off():
        found: dict[str, Any] = {"calls": calls(), "chains": chains()}
        if engine.runner.graphs is not None:
            found["graphs"] = one_or_two(engine)
    return found
