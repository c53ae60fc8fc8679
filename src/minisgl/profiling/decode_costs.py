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
    both), keys and values of every token seen. A product that does a norm, silu·mul or the residual's addition as well
    has those bytes; the operators that it replaces lose them. Mixtures of experts are left out: what they read depends
    on the tokens.
    """
    model, pool = engine.model, engine.runner.pool
    c, layers = model.config, list(model.layers)
    item: int = getattr(torch, engine.config.dtype).itemsize
    hidden = batch * c.hidden_size * item
    attention: list[Any] = [layer.self_attn for layer in layers]
    heads = [batch * a.num_heads * a.head_dim * item for a in attention]
    kv = [2 * batch * a.num_kv_heads * a.head_dim for a in attention]  # numbers
    seen = [min(context, a.window or context) for a in attention]
    costs = {
        "embedding": [OperatorCost(1, 2 * hidden, 0)],
        "rope+store": [OperatorCost(1, 2 * (h + n * item), 0) for h, n in zip(heads, kv, strict=True)],
        "attention": [
            OperatorCost(1, n * s * pool.k.element_size() + 2 * h, 4 * s * h // item)
            for n, s, h in zip(kv, seen, heads, strict=True)
        ],
        **_dense(layers, batch, c.hidden_size, item),
        "lm head": [_product(model.lm_head.weight, batch, item)],
        "sample": [OperatorCost(1, batch * c.vocab_size * item, 0)],
    }
    return {name: _sum(each) for name, each in costs.items() if each}


def _sum(costs: Sequence[OperatorCost]) -> OperatorCost:
    return OperatorCost(*(sum(getattr(cost, name) for cost in costs) for name in ("calls", "bytes", "flops")))


def _dense(layers: Sequence[Any], batch: int, width: int, item: int) -> dict[str, list[OperatorCost]]:
    """Norms, products and activations of all layers and the last norm, each call's cost, by operator.

    As `DecoderLayer` decides it: a product takes the norm before it where the residual stream is whole, which it is
    in the first layer and behind what was added to it: one of our products, or experts.
    """
    names = ("rmsnorm", "qkv", "o", "gate/up", "silu*mul", "down")
    found: dict[str, list[OperatorCost]] = {name: [] for name in names}
    norm, residual = OperatorCost(1, 2 * batch * width * item, 0), OperatorCost(1, 4 * batch * width * item, 0)

    def behind_norm(name: str, layer: Any, product: Any, whole: bool, gated: bool) -> bool:
        fused = whole and _is_ours(layer, product, batch, norm=True, gated=gated)
        if not fused:
            found["rmsnorm"].append(norm if whole else residual)
        found[name].append(_product(product.weight, batch, item, norm=fused, gated=fused and gated))
        return fused

    def onto(name: str, layer: Any, product: Any) -> bool:
        fused = _is_ours(layer, product, batch, add=True)
        found[name].append(_product(product.weight, batch, item, add=fused))
        return fused

    whole = True
    for layer in layers:
        behind_norm("qkv", layer, layer.self_attn.qkv_proj, whole, gated=False)
        whole = onto("o", layer, layer.self_attn.o_proj)
        if not hasattr(layer.mlp, "gate_up_proj"):  # experts
            found["rmsnorm"].append(norm if whole else residual)
            whole = layer.skinny  # else the next norm adds what they give
            continue
        if not behind_norm("gate/up", layer, layer.mlp.gate_up_proj, whole, gated=True):
            inner = layer.mlp.down_proj.weight.shape[1]
            found["silu*mul"].append(OperatorCost(1, 3 * batch * inner * item, 0))
        whole = onto("down", layer, layer.mlp.down_proj)
    found["rmsnorm"].append(norm if whole else residual)
    return found


def _is_ours(layer: Any, product: Any, batch: int, norm: bool = False, gated: bool = False, add: bool = False) -> bool:
    """Whether `layers.skinny_product` serves this product."""
    weight = product.weight
    if not layer.skinny or product.bias is not None:
        return False
    from minisgl.kernels.skinny_gemm.op import tuned

    return tuned(weight.new_empty(batch, weight.shape[1]), weight, norm, gated, add) is not None


def _product(
    weight: Any, batch: int, item: int, norm: bool = False, gated: bool = False, add: bool = False
) -> OperatorCost:
    """`batch` rows with `weight` [out, in], and what it is fused with."""
    rows, columns = weight.shape
    out = rows // 2 if gated else rows
    activations = batch * (columns + out * (1 + add)) + columns * norm
    return OperatorCost(1, weight.nbytes + activations * item, 2 * batch * rows * columns)
