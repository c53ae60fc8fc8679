"""Writing GGUF files as llama.cpp converts models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from minisgl.models.gguf import NAMES

Tensors = dict[str, np.ndarray]
BACK = {theirs: ours for ours, theirs in NAMES.items()}


def to_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from halves to rotary pairs."""
    shape = rows.shape
    return rows.reshape(-1, 2, head_dim // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def to_gguf(oracle: Any, architecture: str) -> Tensors:
    """The oracle's weights under GGUF's names and in its order."""
    config, out, experts = oracle.config, {}, {}
    for name, tensor in oracle.state_dict().items():
        values = tensor.numpy()
        layer, stem, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", name).groups()  # type: ignore[union-attr]
        if architecture == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            values = to_pairs(values, config.head_dim)
        if stem == "mlp.experts.gate_up_proj":
            inner = config.moe_intermediate_size
            experts[f"blk.{layer}.ffn_gate_exps.weight"] = values[:, :inner]
            experts[f"blk.{layer}.ffn_up_exps.weight"] = values[:, inner:]
        elif stem == "mlp.experts.down_proj":
            experts[f"blk.{layer}.ffn_down_exps.weight"] = values
        else:
            out[(f"blk.{layer}." if layer else "") + f"{BACK[stem]}.{kind}"] = values
    if config.tie_word_embeddings:
        out.pop("output.weight")
    return out | experts


def metadata(oracle: Any, architecture: str) -> dict[str, Any]:
    c = oracle.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    own = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.key_length": head_dim,
        "rope.freq_base": c.rope_parameters["rope_theta"],
    }
    if architecture == "qwen3moe":
        own |= {"expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok}
        own["expert_feed_forward_length"] = c.moe_intermediate_size
    return own


def write(path: Path, architecture: str, values: dict[str, Any], tensors: Tensors, kind: str = "F32") -> None:
    """A GGUF file; matrices are quantised to `kind` where their rows divide into its blocks."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    quant = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[quant][0]
    for name, tensor in tensors.items():
        whole = tensor.ndim > 1 and tensor.shape[-1] % block == 0 and kind != "F32"
        data = gguf.quantize(np.ascontiguousarray(tensor), quant) if whole else np.ascontiguousarray(tensor)
        writer.add_tensor(name, data, raw_dtype=quant if whole else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
