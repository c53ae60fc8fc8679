"""Llama 2 and 3, and Mistral, which adds a sliding window."""

from __future__ import annotations

from typing import Any, ClassVar

from minisgl.models.config import Values
from minisgl.models.decoder import CausalLM


class Llama(CausalLM):
    """The plain case: every other family is told by how it differs from this one."""

    family = "llama"
    gguf_architecture: ClassVar[str | None] = "llama"
    gguf_interleaved = True

    @staticmethod
    def read_fields(values: Values, num_layers: int) -> dict[str, Any]:
        bias = values.flag("attention_bias", False)
        return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": values.flag("mlp_bias", False)}


class Mistral(Llama):
    """Llama with one window for all layers. GGUF files of Mistral call themselves llama."""

    family = "mistral"
    gguf_architecture = None

    @staticmethod
    def read_fields(values: Values, num_layers: int) -> dict[str, Any]:
        window = values.integer("sliding_window") if values.has("sliding_window") else None
        return {"windows": (window,) * num_layers}
