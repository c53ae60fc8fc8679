"""Qwen3: each query and key head is normed before it is rotated."""

from __future__ import annotations

from typing import Any

from torch import nn

from minisgl.models.build import Build
from minisgl.models.config import Values, layer_windows
from minisgl.models.decoder import CausalLM
from minisgl.models.layers import Attention


class Qwen3(CausalLM):
    family = "qwen3"
    gguf_architecture = "qwen3"

    @staticmethod
    def read_fields(values: Values, num_layers: int) -> dict[str, Any]:
        bias = values.flag("attention_bias", False)
        head_dim = values.integer("head_dim", 128)
        windows = layer_windows(values, num_layers)
        return {"head_dim": head_dim, "qkv_bias": bias, "o_bias": bias, "windows": windows}

    def make_attention(self, build: Build, layer: int) -> nn.Module:
        return Attention(build, layer, head_norm=True)
