"""GPU kernels out of a trace of torch's profiler (Kineto), each with the operator that launched it.

Spans that were open while the profiler ran are in its trace as `user_annotation` events. A kernel belongs to the
innermost one around the call that launched it, which has the kernel's correlation id. Kernels of a CUDA graph share
the id of the graph's launch: which operator they belong to, their names have to tell.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minisgl.profiling.spans import Span

CLOCK = "minisgl clock"  # an annotation begun at a known time of ours
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


def kernels(trace: dict[str, Any], clock_ns: int) -> list[Span]:
    """Every kernel, copy and memset on the GPU, in the order of their start; none has a path that nobody launched.

    Args:
        trace: of `torch.profiler.profile.export_chrome_trace`, decoded.
        clock_ns: `time.perf_counter_ns()` when the annotation `CLOCK` began.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    shift = clock_ns - _ns(next(e["ts"] for e in events if e["name"] == CLOCK and e.get("cat") == "user_annotation"))
    spans = _annotations(events)
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in _LAUNCHES and "correlation" in e["args"]}
    found = []
    for e in events:
        if e.get("cat") not in _DEVICE:
            continue
        launch = launches.get(e["args"].get("correlation"))
        path = () if launch is None else _path(spans.get(launch["tid"], ()), _ns(launch["ts"]))
        start = _ns(e["ts"]) + shift
        stream = f"stream {e['args'].get('stream', e['tid'])}"
        found.append(Span(e["name"], start, start + _ns(e["dur"]), "gpu", stream, path))
    return sorted(found, key=lambda span: span.start)


def _ns(us: float) -> int:
    return round(float(us) * 1e3)


@dataclass(frozen=True, slots=True)
class _Annotation:
    start: int
    end: int
    name: str
    parent: _Annotation | None


def _annotations(events: Iterable[dict[str, Any]]) -> dict[Any, list[_Annotation]]:
    """The annotations of each thread by start, each with the one around it."""
    found: dict[Any, list[_Annotation]] = {}
    mine = (e for e in events if e.get("cat") == "user_annotation")
    for e in sorted(mine, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        start = _ns(e["ts"])
        row = found.setdefault(e["tid"], [])
        around = row[-1] if row else None
        while around is not None and around.end <= start:
            around = around.parent
        row.append(_Annotation(start, start + _ns(e["dur"]), e["name"], around))
    return found


def _path(row: Sequence[_Annotation], at: int) -> tuple[str, ...]:
    """Names of the annotations open at a time."""
    place = bisect_right(row, at, key=lambda a: a.start) - 1
    names: list[str] = []
    inner = row[place] if place >= 0 else None
    while inner is not None:
        if inner.end >= at:
            names.append(inner.name)
        inner = inner.parent
    return tuple(reversed(names))
