"""The span hook: where time goes, if someone asks. And Python's garbage collector, kept out of where it harms.

Nothing is measured unless `set_span_hook` installs a hook; `span` then costs one call of it. Off, it costs one
comparison and returns a shared context manager that does nothing.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from minisgl.types import ConfigError

log = logging.getLogger(__name__)

SpanHook = Callable[[str], AbstractContextManager[object]]

_nothing: AbstractContextManager[object] = nullcontext()
_hook: SpanHook | None = None


def set_span_hook(hook: SpanHook | None) -> SpanHook | None:
    """Installs `hook`, called with each span's name; None turns it off. Returns the hook before it."""
    global _hook
    before, _hook = _hook, hook
    return before


def span(name: str) -> AbstractContextManager[object]:
    """A context manager around the work called `name`."""
    return _nothing if _hook is None else _hook(name)


def use_nvtx() -> bool:
    """Makes spans NVTX ranges, which Nsight Systems shows, if $MINISGL_NVTX asks for that; whether it does.

    Raises:
        ConfigError: it does, but the installed torch can't.
    """
    asked = os.environ.get("MINISGL_NVTX") or "0"
    if asked not in ("0", "1"):
        raise ConfigError(f"MINISGL_NVTX is {asked!r}; expected 1 for NVTX ranges, or 0")
    if asked == "0":
        return False
    from torch.cuda import nvtx

    try:
        nvtx.mark("minisgl")  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ConfigError("MINISGL_NVTX is set, but the installed torch has no NVTX; install a CUDA build") from None
    set_span_hook(nvtx.range)
    return True


@contextmanager
def collector_off() -> Iterator[None]:
    """Keeps Python's garbage collector from running, in any thread: imports take a seventh less time without.

    What it frees may be CUDA's, such as the graphs of an engine let go before, and CUDA allows no such call while
    a stream is captured: the capture is lost.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def phase(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """A part of a start: the log (debug) tells how long it took, and so does `seconds[name]`."""
    began = time.perf_counter()
    yield
    took = time.perf_counter() - began
    log.debug("%s: %.3f s", name, took)
    if seconds is not None:
        seconds[name] = took
