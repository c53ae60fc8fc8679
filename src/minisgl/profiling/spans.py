"""Spans of several processes on one clock: recorded, merged, and written as a trace that Perfetto and Chrome load.

The clock is `time.perf_counter_ns`, on Linux the system's monotonic clock: the same in every process of a machine.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisgl.types import MinisglError

MAX_SPANS = 1_000_000  # of one recording, some 100 MB; what comes then is counted, no more


@dataclass(frozen=True, slots=True)
class Span:
    """Work with a name. Times are nanoseconds of `time.perf_counter_ns`.

    For a kernel `process` is "gpu", `thread` its stream and `path` the spans around its launch, the outermost first.
    """

    name: str
    start: int
    end: int
    process: str
    thread: str
    path: tuple[str, ...] = ()

    @property
    def us(self) -> float:
        return (self.end - self.start) / 1e3


def short_name(kernel: str) -> str:
    """A C++ kernel's name without return type, namespaces and what it was made and called with; others as they are."""
    plain = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    if not kernel.startswith("void ") and "::" not in plain:
        return kernel
    return re.split(r"[<(]", plain, maxsplit=1)[0].rpartition("::")[2] or kernel


def exclusive(spans: Iterable[Span]) -> list[Span]:
    """The spans with each kernel cut to the time that is its own: from the end of all kernels that began before it.

    With programmatic dependent launch a kernel begins while the one before still works, and waits for it: the
    profiler counts that into both, so that durations add up to more than the time that passes. What the waiting one
    has done by then isn't seen apart from its waiting, and counts as the other's. Own times add up to the time in
    which the GPU works. A kernel that ends before an earlier one does has none: its end is its start.
    """
    found: list[Span] = []
    busy_until = -1
    for s in sorted(spans, key=lambda s: s.start):  # stable: kernels that begin at once stay in the stream's order
        if s.process != "gpu":
            found.append(s)
            continue
        found.append(replace(s, start=min(max(s.start, busy_until), s.end)))
        busy_until = max(busy_until, s.end)
    return found


class Recorder:
    """Collects the spans of this process; `span` is a hook for `timing.set_span_hook`. Threads may share it."""

    def __init__(self, process: str) -> None:
        self.process = process
        self.dropped = 0
        self._found: list[tuple[str, int, int, int]] = []  # with the thread's id
        self._threads: dict[int, str] = {}

    def span(self, name: str) -> _Open:
        return _Open(self.mark, name)

    def mark(self, name: str, start: int, end: int) -> None:
        """A span whose times are known."""
        thread = threading.get_ident()
        if thread not in self._threads:
            self._threads[thread] = threading.current_thread().name
        if len(self._found) < MAX_SPANS:
            self._found.append((name, start, end, thread))
        else:
            self.dropped += 1

    def spans(self) -> list[Span]:
        """What was recorded so far, by the end of each."""
        return [Span(name, start, end, self.process, self._threads[t]) for name, start, end, t in self._found]


class _Open:
    """A span under way."""

    __slots__ = ("_mark", "_name", "_start")

    def __init__(self, mark: Callable[[str, int, int], None], name: str) -> None:
        self._mark, self._name = mark, name

    def __enter__(self) -> None:
        self._start = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._mark(self._name, self._start, time.perf_counter_ns())


# -- files ---------------------------------------------------------------------------------------------------------


def write_trace(path: Path, spans: Iterable[Span], facts: dict[str, Any]) -> Path:
    """Writes a trace in the Trace Event Format: complete events ("X") by process and thread, named by metadata ("M").

    Args:
        facts: what else is known of the capture; kept as `otherData`.

    Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        place = span.process, span.thread
        if place not in threads:
            pid = processes.setdefault(span.process, len(processes) + 1)
            threads[place] = len(threads) + 1
            named = {"process_name": span.process, "thread_name": span.thread}
            events += [
                {"ph": "M", "name": kind, "pid": pid, "tid": threads[place], "args": {"name": name}}
                for kind, name in named.items()
            ]
        times = {"ts": span.start / 1e3, "dur": span.us}
        ids = {"pid": processes[span.process], "tid": threads[place]}
        extra = {"args": {"path": span.path}} if span.path else {}
        events.append({"ph": "X", "name": span.name, "cat": span.process, **times, **ids, **extra})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}), encoding="utf-8")
    return path


def read_trace(file: Path) -> tuple[list[Span], dict[str, Any]]:
    """Spans and facts of a trace that `write_trace` wrote.

    Raises:
        MinisglError: the file can't be read, or isn't one.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in found["traceEvents"] if e["ph"] == "M"}
        spans = []
        for e in found["traceEvents"]:
            if e["ph"] == "X":
                start = round(e["ts"] * 1e3)
                process, thread = (names[kind, e["pid"], e["tid"]] for kind in ("process_name", "thread_name"))
                path = tuple(e.get("args", {}).get("path", ()))
                spans.append(Span(e["name"], start, start + round(e["dur"] * 1e3), process, thread, path))
        return spans, found["otherData"]
    except OSError as error:
        raise MinisglError(f"can't read the trace {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MinisglError(f"{file} is no trace of minisgl's ({type(error).__name__}: {error})") from None
