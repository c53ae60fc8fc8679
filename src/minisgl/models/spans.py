"""Spans around a model's operators, for whoever looks where its time goes.

They are put around the methods of one model's objects from outside, and taken off again: a model that nobody looks at
runs exactly the code of its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.timing import span

if TYPE_CHECKING:
    from minisgl.models.cpu import PackedStack
    from minisgl.models.decoder import CausalLM

Mark = Callable[[str, int, int], None]  # name, start and end in nanoseconds of time.perf_counter_ns

# Operators of a layer: the object's place in it, its method, the span's name. Absent ones are passed over, so that
# a name may have several places.
_LAYER = (
    ("", "forward", "layer {}"),
    ("input_layernorm", "forward", "rmsnorm"),
    ("self_attn.qkv_proj", "forward", "qkv"),
    ("self_attn", "_rotate_and_store", "rope+store"),
    ("self_attn", "_rotate_and_store_fused", "rope+store"),
    ("self_attn.o_proj", "forward", "o"),
    ("post_attention_layernorm", "forward", "rmsnorm"),
    ("mlp.gate_up_proj", "forward", "gate/up"),
    ("mlp.down_proj", "forward", "down"),
    ("mlp.gate", "forward", "router"),
)
_MODEL = (
    ("embed_tokens", "embed", "embedding"),
    ("rotary", "forward", "rotary angles"),
    ("norm", "forward", "rmsnorm"),
    ("lm_head", "logits", "lm head"),
)
_MOST_KEPT = 1000  # steps
# What the C++ decoder marks, in order (csrc/cpu/decoder.cpp).
_MARKED = ("rmsnorm", "qkv", "rope+store", "attention", "o", "rmsnorm", "gate/up", "silu*mul", "down")


def add_spans(model: CausalLM, attention: AttentionBackend, mark: Mark | None = None) -> Callable[[], None]:
    """Puts `timing.span` around each operator of `model` and around `attention`; each layer's lie within `layer N`.

    Args:
        mark: told the operators inside the C++ decoder, which has no spans, at the end or before. None: they stay
            unseen.

    Returns:
        What takes the spans off again.
    """
    undo: list[Callable[[], None]] = []
    for path, method, name in _MODEL:
        undo += _wrap(model, path, method, name)
    for i, layer in enumerate(model.layers):
        for path, method, name in _LAYER:
            undo += _wrap(layer, path, method, name.format(i))
        # what it does outside of its products is the activation; a mixture of experts has no products of its own
        undo += _wrap(layer, "mlp", "forward", "silu*mul" if hasattr(layer.mlp, "gate_up_proj") else "experts")
    undo += _wrap(attention, "", "forward", "attention")
    if model.stack is not None:
        undo += _wrap(model.stack, "", "hidden", "layers")
        if mark is not None:
            undo.append(_mark_stack(model.stack, mark))

    def remove() -> None:
        while undo:
            undo.pop()()

    return remove


def _wrap(root: Any, path: str, method: str, name: str) -> Iterator[Callable[[], None]]:
    """Hides a method of the object at `path` behind one in a span; yields what brings it to light again."""
    owner = root
    for part in filter(None, path.split(".")):
        owner = getattr(owner, part, None)
    inner = getattr(owner, method, None)
    if inner is None:
        return

    def within(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return inner(*args, **kwargs)

    yield replace_method(owner, method, within)


def replace_method(owner: Any, method: str, by: Callable[..., Any]) -> Callable[[], None]:
    """Gives one object another method; returns what gives it back the one before."""
    before = vars(owner).get(method)  # None: that of its class
    setattr(owner, method, by)
    return lambda: delattr(owner, method) if before is None else setattr(owner, method, before)


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
