"""Qwen2 and Qwen2.5: biases on queries, keys and values; windows in the upper layers where a configuration asks."""

from __future__ import annotations

from typing import Any

from minisgl.models.config import Values, layer_windows
from minisgl.models.decoder import CausalLM


class Qwen2(CausalLM):
    family = "qwen2"
    gguf_architecture = "qwen2"

    @staticmethod
    def read_fields(values: Values, num_layers: int) -> dict[str, Any]:
        return {"qkv_bias": True, "windows": layer_windows(values, num_layers)}
