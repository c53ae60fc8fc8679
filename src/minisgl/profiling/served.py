"""An engine whose spans, and on a GPU kernels, can be captured while it serves."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minisgl.config import EngineConfig
from minisgl.engine import lead
from minisgl.engine.engine import Engine
from minisgl.engine.runner import StepHandle
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.messages import Profiled
from minisgl.models.spans import replace_method
from minisgl.profiling import kineto
from minisgl.profiling.decoder_marks import watch_operators
from minisgl.profiling.spans import Recorder, Span, write_trace
from minisgl.timing import set_span_hook, span


class EngineCapture:
    """Records the spans of one engine, in this process, from `start` to `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._recorder: Recorder | None = None
        self._undo: list[Callable[[], object]] = []
        self._torch: profile | None = None
        self._clock_ns = 0

    def start(self) -> None:
        """Puts spans around the engine's operators, and on a GPU starts torch's profiler."""
        assert self._recorder is None, "one capture at a time"
        recorder = self._recorder = Recorder("engine")
        on_gpu = self.engine.device.type == "cuda"
        if on_gpu:
            self._start_torch()
        before = set_span_hook(_both(recorder) if on_gpu else recorder.span)
        self._undo.append(lambda: set_span_hook(before))
        self._undo.append(watch_operators(self.engine.model, self.engine.runner.attention, recorder.mark))
        self._undo.append(_name_steps(self.engine))

    def stop(self) -> tuple[list[Span], int]:
        """Spans of the host and kernels of the GPU, and how many spans there was no room for."""
        assert self._recorder is not None, "no capture was started"
        while self._undo:
            self._undo.pop()()
        recorder, self._recorder = self._recorder, None
        return recorder.spans() + self._stop_torch(), recorder.dropped

    def _start_torch(self) -> None:
        self._torch = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self._torch.start()
        self._clock_ns = time.perf_counter_ns()
        with record_function(kineto.CLOCK):
            pass

    def _stop_torch(self) -> list[Span]:
        if self._torch is None:
            return []
        torch.cuda.synchronize(self.engine.device)
        self._torch.stop()
        with tempfile.TemporaryDirectory(prefix="minisgl-trace-") as folder:
            path = Path(folder) / "torch.json"
            self._torch.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8"))
        self._torch = None
        return kineto.kernels(trace, self._clock_ns)


def _both(recorder: Recorder) -> Callable[[str], Any]:
    """Spans for us, and for torch's profiler, which attributes kernels by them."""

    @contextmanager
    def opened(name: str) -> Iterator[None]:
        with recorder.span(name), record_function(name):
            yield

    return opened


def _name_steps(engine: Engine) -> Callable[[], None]:
    """Puts a span around each launch that says what it computes."""
    inner = engine.runner.launch

    def launch(batch: ScheduledBatch) -> StepHandle:
        decodes = batch.num_decodes == len(batch.requests) and not batch.admitted
        with span(f"decode {len(batch.requests)}" if decodes else f"prefill {batch.num_tokens}"):
            return inner(batch)

    return replace_method(engine.runner, "launch", launch)


def route(engine: Engine) -> str:
    """How the engine runs its layers, and so whence the times of operators come."""
    if engine.model.stack is not None:
        return "C++ decoder, timed inside"
    if engine.device.type == "cpu":
        return "PyTorch, layer by layer"
    graphs = "decodes in CUDA graphs" if engine.runner.graphs is not None else "no CUDA graphs"
    return f"CUDA kernels by torch's profiler, {graphs}"


class CapturedEngine:
    """An engine for `engine.process` that also answers `Profile`: everything else goes to the engine itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._capture = EngineCapture(engine)
        self._folder = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def profile(self, folder: str | None) -> Profiled:
        """Begins a capture, or with None ends it and writes its trace."""
        if folder is not None:
            self._folder = folder
            self._capture.start()
            return Profiled()
        spans, dropped = self._capture.stop()
        config = self._engine.config
        facts = {"route": route(self._engine), "device": config.device, "dtype": config.dtype, "dropped": dropped}
        path = Path(self._folder) / f"engine-{os.getpid()}.json"
        try:
            return Profiled(path=str(write_trace(path, spans, facts)))
        except OSError as error:
            return Profiled(error=f"can't write {path}: {error.strerror}")


def make_engine(config: EngineConfig) -> CapturedEngine:
    """The engine that `serve` would start, made to be captured."""
    return CapturedEngine(lead.make_engine(config))
