"""Spans: recorded, written as a trace and read back; kernels out of torch's own trace."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from minisgl.profiling import kineto, spans
from minisgl.profiling.spans import Recorder, Span, read_trace, write_trace
from minisgl.types import MinisglError


def test_recorder_keeps_times_and_threads() -> None:
    recorder = Recorder("here")
    before = time.perf_counter_ns()
    with recorder.span("outer"), recorder.span("inner"):
        pass
    other = threading.Thread(target=lambda: recorder.mark("elsewhere", 1, 2), name="worker")
    other.start()
    other.join()
    inner, outer, elsewhere = recorder.spans()
    assert [inner.name, outer.name] == ["inner", "outer"]
    assert before <= outer.start <= inner.start <= inner.end <= outer.end <= time.perf_counter_ns()
    assert (elsewhere.thread, elsewhere.us, elsewhere.process) == ("worker", 0.001, "here")


def test_recorder_closes_a_span_that_fails() -> None:
    recorder = Recorder("here")
    with pytest.raises(ValueError, match="on purpose"), recorder.span("work"):
        raise ValueError("on purpose")
    assert [s.name for s in recorder.spans()] == ["work"]


def test_recorder_counts_what_it_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "MAX_SPANS", 2)
    recorder = Recorder("here")
    for _ in range(5):
        with recorder.span("work"):
            pass
    assert (len(recorder.spans()), recorder.dropped) == (2, 3)


def test_trace_comes_back_as_it_was_written(tmp_path: Path) -> None:
    now = 3_600_000_000_000_123  # a machine that has been up for weeks: nanoseconds survive
    written = [
        Span("step", now, now + 5_000_001, "engine", "MainThread"),
        Span("gemm", now + 7, now + 1_000_000, "gpu", "stream 7", ("step", "layer 0", "qkv")),
        Span("tokenize", now - 900, now - 100, "server", "worker"),
    ]
    path = write_trace(tmp_path / "new" / "trace.json", written, {"route": "this one"})
    found, facts = read_trace(path)
    assert sorted(found, key=str) == sorted(written, key=str) and facts == {"route": "this one"}


def test_trace_is_in_the_trace_event_format(tmp_path: Path) -> None:
    written = [Span("a", 10_000, 30_000, "engine", "t"), Span("b", 15_000, 20_000, "server", "t")]
    trace = json.loads(write_trace(tmp_path / "trace.json", written, {}).read_text())
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in complete] == [("a", 10.0, 20.0), ("b", 15.0, 5.0)]
    assert len({e["pid"] for e in complete}) == 2
    named = {(e["pid"], e["name"]): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert [named[e["pid"], "process_name"] for e in complete] == ["engine", "server"]


@pytest.mark.parametrize("content", ["", "[]", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": []}'])
def test_reading_what_is_no_trace_says_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(MinisglError, match="no trace"):
        read_trace(path)
    with pytest.raises(MinisglError, match="can't read"):
        read_trace(tmp_path / "missing.json")


# -- torch's traces ------------------------------------------------------------------------------------------------


def _event(cat: str, name: str, ts: float, dur: float, tid: Any = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def kineto_trace() -> dict[str, Any]:
    """As Kineto writes them: launches on the host's thread, kernels on their stream, tied by the correlation id."""
    return {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
            _event("user_annotation", kineto.CLOCK, 100.0, 1.0),
            _event("user_annotation", "step", 110.0, 100.0),
            _event("user_annotation", "layer 0", 112.0, 50.0),
            _event("user_annotation", "qkv", 115.0, 10.0),
            _event("user_annotation", "o", 130.0, 10.0),
            _event("user_annotation", "other thread's", 100.0, 200.0, tid=2),
            _event("gpu_user_annotation", "step", 140.0, 60.0, tid=7),
            _event("cuda_runtime", "cudaLaunchKernel", 118.0, 2.0, correlation=1),
            _event("cuda_driver", "cuLaunchKernelEx", 131.0, 2.0, correlation=2),
            _event("cuda_runtime", "cudaGraphLaunch", 170.0, 5.0, correlation=3),
            _event("cuda_runtime", "cudaMemcpyAsync", 205.0, 1.0, correlation=4),
            _event("kernel", "attention", 190.5, 4.0, tid=7, stream=7, correlation=3),
            _event("kernel", "gemm", 150.25, 8.0, tid=7, stream=7, correlation=1),
            _event("kernel", "splitK", 160.0, 3.0, tid=7, stream=7, correlation=2),
            _event("kernel", "gemm", 180.0, 8.0, tid=7, stream=7, correlation=3),
            _event("gpu_memcpy", "Memcpy DtoH", 215.0, 1.0, tid=7, stream=7, correlation=4),
            _event("kernel", "orphan", 230.0, 1.0, tid=7, stream=7, correlation=99),
        ]
    }


def test_kernels_belong_to_the_span_that_launched_them() -> None:
    found = kineto.kernels(kineto_trace(), clock_ns=1_000_000)
    assert [(s.name, s.path) for s in found] == [
        ("gemm", ("step", "layer 0", "qkv")),
        ("splitK", ("step", "layer 0", "o")),
        ("gemm", ("step",)),  # of a graph
        ("attention", ("step",)),
        ("Memcpy DtoH", ("step",)),
        ("orphan", ()),
    ]
    assert {(s.process, s.thread) for s in found} == {("gpu", "stream 7")}


def test_kernels_are_on_our_clock() -> None:
    first = kineto.kernels(kineto_trace(), clock_ns=1_000_000)[0]
    assert (first.start, first.end) == (1_000_000 + 50_250, 1_000_000 + 58_250)


def test_installed_torch_writes_the_annotations_that_are_read(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        clock = time.perf_counter_ns()
        with record_function(kineto.CLOCK):
            pass
        with record_function("outer"), record_function("inner"):
            pass
    path = tmp_path / "torch.json"
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    inner = next(e for e in trace["traceEvents"] if e["name"] == "inner")
    launch = _event("cuda_runtime", "cudaLaunchKernel", inner["ts"], 0.1, tid=inner["tid"], correlation=-1)
    kernel = _event("kernel", "gemm", inner["ts"] + 9, 1.0, tid=7, stream=7, correlation=-1)
    trace["traceEvents"] += [launch, kernel]
    [found] = kineto.kernels(trace, clock)
    assert found.path == ("outer", "inner")
