"""A dense model on the CPU: all layers in one call of the C++ decoder (csrc/cpu/decoder.hpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisgl.attention.base import ForwardBatch
from minisgl.kernels.cpu import PackedMatrix, address, native, pages
from minisgl.models.layers import MLP, Attention
from minisgl.models.rotary import Rotation

if TYPE_CHECKING:
    from minisgl.models.decoder import CausalLM, DecoderLayer


class PackedStack:
    """The layers of `model`, which must be built with packed weights and outlive this."""

    def __init__(self, model: CausalLM) -> None:
        c = model.config
        sizes = (c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim)
        embedding = _native(model.embed_tokens.weight)
        self.model = model
        self.marks: Tensor | None = None  # [9 layers + 3] int64: a step notes when it began and each operator ended
        # What is left to torch is little, and its idle threads would spin where ours work.
        torch.set_num_threads(1)
        self.native = native.Decoder(sizes, c.norm_eps, embedding, model.norm.weight.data_ptr())
        for layer in model.layers:
            self._add(layer)  # type: ignore[arg-type]

    def _add(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, MLP)
        head_norm = attention.head_norm.weight if attention.head_norm is not None else None
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight, head_norm
        linears = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        qkv, o, gate_up, down = (_native(linear.weight) for linear in linears)
        b1, b2, b3, b4 = (address(linear.bias) for linear in linears)
        n1, n2, n3 = (address(norm) for norm in norms)
        window = attention.window or 0
        self.native.add_layer((n1, n2, n3), qkv, o, gate_up, down, (b1, b2, b3, b4), window)

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """As `CausalLM.hidden`."""
        rotation, pool = self.model.rotary(batch.positions), batch.pool
        assert isinstance(rotation, Rotation)
        rows = batch.logits_indices.long()  # type: ignore[union-attr]
        out = torch.empty(rows.shape[0], self.model.config.hidden_size)
        counts = batch.input_ids.shape[0], rows.shape[0]
        inputs = batch.input_ids, rotation.cos, rotation.sin, batch.slots, rows
        ids, cos, sin, slots, wanted = (x.data_ptr() for x in inputs)
        paging = pages(batch.page_table, batch.seq_lens, batch.query_starts, pool.page_size)
        cache = pool.k.data_ptr(), pool.v.data_ptr(), pool.k.stride(0)
        self.native.forward(*counts, ids, cos, sin, slots, wanted, paging, *cache, out.data_ptr(), address(self.marks))
        return out


def _native(weight: object) -> native.PackedWeight:
    assert isinstance(weight, PackedMatrix)
    return weight.native
