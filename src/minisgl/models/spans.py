"""Spans around a model's operators, for whoever looks where its time goes.

They are put around the methods of one model's objects from outside, and taken off again: a model that nobody looks at
runs exactly the code of its source.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from minisgl.attention.base import AttentionBackend
from minisgl.timing import span

if TYPE_CHECKING:
    from minisgl.models.decoder import CausalLM

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
    ("mlp", "activate", "silu*mul"),
    ("mlp.down_proj", "forward", "down"),
    ("mlp.gate", "forward", "router"),
)
_MODEL = (
    ("embed_tokens", "embed", "embedding"),
    ("rotary", "forward", "rotary angles"),
    ("norm", "forward", "rmsnorm"),
    ("lm_head", "logits", "lm head"),
)


def add_spans(model: CausalLM, attention: AttentionBackend) -> Callable[[], None]:
    """Puts `timing.span` around each operator of `model` and around `attention`; each layer's lie within `layer N`.

    What lies inside the C++ decoder stays unseen, and which product one by `skinny_product` is;
    `profiling.decoder_marks` shows that too.

    Returns:
        What takes the spans off again.
    """
    undo = ExitStack()
    for path, method, name in _MODEL:
        _wrap(undo, model, path, method, name)
    for i, layer in enumerate(model.layers):
        for path, method, name in _LAYER:
            _wrap(undo, layer, path, method, name.format(i))
        if not hasattr(layer.mlp, "gate_up_proj"):  # a mixture of experts has no products of its own
            _wrap(undo, layer, "mlp", "forward", "experts")
    _wrap(undo, attention, "", "forward", "attention")
    if model.stack is not None:
        _wrap(undo, model.stack, "", "hidden", "layers")
    return undo.close


def _wrap(undo: ExitStack, root: Any, path: str, method: str, name: str) -> None:
    """Hides a method of the object at `path` behind one in a span, until `undo` brings it to light again."""
    owner = root
    for part in filter(None, path.split(".")):
        owner = getattr(owner, part, None)
    inner = getattr(owner, method, None)
    if inner is None:
        return

    def within(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return inner(*args, **kwargs)

    undo.callback(replace_method(owner, method, within))


def replace_method(owner: Any, method: str, by: Callable[..., Any]) -> Callable[[], None]:
    """Gives one object another method; returns what gives it back the one before."""
    before = vars(owner).get(method)  # None: that of its class
    setattr(owner, method, by)
    return lambda: delattr(owner, method) if before is None else setattr(owner, method, before)
