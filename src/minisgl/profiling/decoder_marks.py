"""Operators that no method of the model stands for: the C++ decoder's, and products by `skinny_product`.

The decoder notes when each of its operators ends (csrc/cpu/decoder.cpp). Layers call `skinny_product` past the methods
of their projections; which product a call is, its weight tells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.models import decoder
from minisgl.models.cpu import PackedStack
from minisgl.models.decoder import CausalLM
from minisgl.models.spans import add_spans, replace_method
from minisgl.timing import span

Mark = Callable[[str, int, int], None]  # name, start and end in nanoseconds of time.perf_counter_ns

_MOST_KEPT = 1000  # steps
_PRODUCTS = {
    "self_attn.qkv_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_up_proj": "gate/up", "mlp.down_proj": "down",
}  # fmt: skip
# What the decoder marks, in order (csrc/cpu/decoder.cpp).
_MARKED = ("rmsnorm", "qkv", "rope+store", "attention", "o", "rmsnorm", "gate/up", "silu*mul", "down")


def watch_operators(model: CausalLM, attention: AttentionBackend, mark: Mark) -> Callable[[], None]:
    """As `models.spans.add_spans`, and inside the C++ decoder too, and around layers' products by `skinny_product`.

    Args:
        mark: told the operators in there, at the end or before.

    Returns:
        What ends it.
    """
    remove_spans = add_spans(model, attention)
    remove_products = _name_products(model)
    remove_marks = _mark_stack(model.stack, mark) if model.stack is not None else lambda: None

    def remove() -> None:
        remove_marks()
        remove_products()
        remove_spans()

    return remove


def _name_products(model: CausalLM) -> Callable[[], None]:
    """Puts a span around each call of `skinny_product` for a layer of `model`, with the name of its product."""
    named = ((layer, path, name) for layer in model.layers for path, name in _PRODUCTS.items())
    names = {id(weight): name for layer, path, name in named if (weight := _weight(layer, path)) is not None}
    inner: Callable[..., Tensor | None] = vars(decoder)["skinny_product"]

    def product(x: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        name = names.get(id(weight))
        if name is None:
            return inner(x, weight, *args, **kwargs)
        with span(name):
            return inner(x, weight, *args, **kwargs)

    return replace_method(decoder, "skinny_product", product)


def _weight(layer: object, path: str) -> object:
    """The weight of a layer's projection, or None where it has none such."""
    return reduce(lambda found, part: getattr(found, part, None), [*path.split("."), "weight"], layer)


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
