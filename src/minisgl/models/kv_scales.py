"""What an FP8 cache divides keys and values by, from the weights alone: nobody has to bring calibration data.

A normed input has a root mean square of 1 before the norm's gain, so that of a projection's output is about the norm of
its row, gain included; keys that are normed have that of their norm's weights, exactly. FP8 (e4m3) keeps three bits
behind the leading one from 2^-6 to 448: scaled to a root mean square of TYPICAL, an element 100 times larger still
fits, and one 200 times smaller is as precise. Scales are powers of two, which round nothing by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.models.decoder import CausalLM, DecoderLayer
from minisgl.models.layers import Attention

TYPICAL = 4.0


def kv_scales(model: CausalLM) -> tuple[Tensor, Tensor]:
    """Scales of keys and of values, [num_layers, KV heads of this rank] float32 each."""
    sizes = []
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer) and isinstance(layer.self_attn, Attention)
        sizes.append(typical_sizes(layer.self_attn, layer.input_layernorm.weight))
    k, v = torch.stack(sizes, dim=1).div(TYPICAL).log2().round().exp2()
    return k, v


def typical_sizes(attention: Attention, gain: Tensor) -> Tensor:
    """Root mean squares of keys and of values, [2, KV heads]; `gain` [hidden_size] is of the norm before."""
    rows = 2 * attention.num_kv_heads * attention.head_dim
    projection = attention.qkv_proj
    assert isinstance(projection.weight, Tensor), "packed weights belong to a float32 cache"
    squares = (projection.weight[-rows:].float() * gain.float()).square().sum(1)
    if projection.bias is not None:
        squares += projection.bias[-rows:].float().square()
    if attention.head_norm is not None:
        squares[: rows // 2] = attention.head_norm.weight[attention.num_heads :].float().square().flatten()
    return squares.view(2, attention.num_kv_heads, -1).mean(-1).sqrt()
