"""The operators inside the C++ decoder, which has no spans: it notes when each ends (csrc/cpu/decoder.cpp)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.models.cpu import PackedStack
from minisgl.models.decoder import CausalLM
from minisgl.models.spans import add_spans, replace_method

Mark = Callable[[str, int, int], None]  # name, start and end in nanoseconds of time.perf_counter_ns

_MOST_KEPT = 1000  # steps
# What the decoder marks, in order (csrc/cpu/decoder.cpp).
_MARKED = ("rmsnorm", "qkv", "rope+store", "attention", "o", "rmsnorm", "gate/up", "silu*mul", "down")


def watch_operators(model: CausalLM, attention: AttentionBackend, mark: Mark) -> Callable[[], None]:
    """As `models.spans.add_spans`, and inside the C++ decoder too.

    Args:
        mark: told the operators in there, at the end or before.

    Returns:
        What ends it.
    """
    remove_spans = add_spans(model, attention)
    remove_marks = _mark_stack(model.stack, mark) if model.stack is not None else lambda: None

    def remove() -> None:
        remove_marks()
        remove_spans()

    return remove


def _mark_stack(stack: PackedStack, mark: Mark) -> Callable[[], None]:
    """Has the C++ decoder note when each operator ends; handed on later, since that takes longer than some steps."""
    inner, num_layers = stack.hidden, len(stack.model.layers)
    marks = stack.marks = torch.zeros(len(_MARKED) * num_layers + 3, dtype=torch.int64)

    kept: list[Tensor] = []

    def hidden(batch: ForwardBatch) -> Tensor:
        out = inner(batch)
        kept.append(marks.clone())
        if len(kept) == _MOST_KEPT:
            hand_on()
        return out

    def hand_on() -> None:
        for step in kept:
            _tell(step.tolist(), num_layers, mark)
        kept.clear()

    restore = replace_method(stack, "hidden", hidden)

    def remove() -> None:
        stack.marks = None
        restore()
        hand_on()

    return remove


def _tell(times: list[int], num_layers: int, mark: Mark) -> None:
    """Hands on the marks of one step."""
    mark("embedding", times[0], times[1])
    for i in range(num_layers):
        first = 1 + i * len(_MARKED)
        mark(f"layer {i}", times[first], times[first + len(_MARKED)])
        for place, name in enumerate(_MARKED, first):
            mark(name, times[place], times[place + 1])
    mark("rmsnorm", times[-2], times[-1])
