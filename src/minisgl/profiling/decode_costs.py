"""What each operator of a decode step must at least move and compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from minisgl.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """Of all calls of an operator in one step: how many there are, bytes moved, floating-point operations."""

    calls: int
    bytes: int
    flops: int


def decode_costs(engine: Engine, batch: int, context: int) -> dict[str, OperatorCost]:
    """By operator, of a step that computes one token for each of `batch` requests with `context` tokens.

    Weights count once in the format in which they lie, activations as they are read and written (a residual sum is
    both), keys and values of every token seen. Mixtures of experts are left out: what they read depends on the tokens.
    """
    model, pool = engine.model, engine.runner.pool
    c, layers = model.config, list(model.layers)
    item: int = getattr(torch, engine.config.dtype).itemsize
    hidden = batch * c.hidden_size * item
    attention: list[Any] = [layer.self_attn for layer in layers]
    mlps: list[Any] = [layer.mlp for layer in layers if hasattr(layer.mlp, "gate_up_proj")]
    heads = [batch * a.num_heads * a.head_dim * item for a in attention]
    kv = [2 * batch * a.num_kv_heads * a.head_dim for a in attention]  # numbers
    seen = [min(context, a.window or context) for a in attention]
    costs = {
        "embedding": OperatorCost(1, 2 * hidden, 0),
        "rmsnorm": OperatorCost(2 * len(layers) + 1, (2 * len(layers) + 1) * 4 * hidden, 0),
        "qkv": _products([a.qkv_proj.weight for a in attention], batch, item),
        "rope+store": OperatorCost(len(layers), sum(2 * (h + n * item) for h, n in zip(heads, kv, strict=True)), 0),
        "attention": OperatorCost(
            len(layers),
            sum(n * s * pool.k.element_size() + 2 * h for n, s, h in zip(kv, seen, heads, strict=True)),
            sum(4 * s * h // item for s, h in zip(seen, heads, strict=True)),
        ),
        "o": _products([a.o_proj.weight for a in attention], batch, item),
        "gate/up": _products([m.gate_up_proj.weight for m in mlps], batch, item),
        "silu*mul": OperatorCost(len(mlps), sum(3 * batch * m.down_proj.weight.shape[1] * item for m in mlps), 0),
        "down": _products([m.down_proj.weight for m in mlps], batch, item),
        "lm head": _products([model.lm_head.weight], batch, item),
        "sample": OperatorCost(1, batch * c.vocab_size * item, 0),
    }
    return {name: cost for name, cost in costs.items() if cost.calls}


def _products(weights: Sequence[Any], batch: int, item: int) -> OperatorCost:
    """Of `batch` rows with each of `weights` [out, in]."""
    shapes = [tuple(w.shape) for w in weights]
    activations = sum(batch * (rows + columns) * item for rows, columns in shapes)
    flops = sum(2 * batch * rows * columns for rows, columns in shapes)
    return OperatorCost(len(weights), sum(w.nbytes for w in weights) + activations, flops)
