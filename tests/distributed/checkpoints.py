"""Small random models of every family whose shapes divide by 2, 4 and 8, as safetensors and as GGUF files.

The vocabulary divides by none of these, blocks of 32 columns don't always, and some have fewer key-value heads than
ranks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from gguf_files import BACK, Tensors, to_pairs, write
from safetensors.torch import save_file
from torch import Tensor

from minisgl.models.build import model_places
from minisgl.models.registry import load_model

VOCAB = 131
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


def _config(model_type: str, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "head_dim": 8 if model_type == "qwen2" else 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
    } | more


_MOE = {"moe_intermediate_size": 64, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}
CONFIGS = {
    "llama": _config("llama", 2, attention_bias=True, mlp_bias=True),
    "mistral": _config("mistral", 8, sliding_window=11),
    "qwen2": _config("qwen2", 2, tie_word_embeddings=True),
    "qwen3": _config("qwen3", 4),
    "qwen3_moe": _config("qwen3_moe", 1, **_MOE),
    "qwen3_moe_mixed": _config("qwen3_moe", 8, mlp_only_layers=[0], tie_word_embeddings=True, **_MOE),
}


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Logits that lie far apart, norms around 1, biases that matter, layers that outweigh the embedding."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return noise * 0.2 + ("norm" in name)
    return noise * (0.4 if "embed" in name or "lm_head" in name else 2 * shape[-1] ** -0.5)


def write_folder(family: str, folder: Path) -> dict[str, Tensor]:
    """A checkpoint of `family` (a key of CONFIGS); its tensors by name."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    model = load_model(folder, torch.float32, torch.device("cpu"), dummy=True, progress=False)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _values(name, place.shape, generator) for name, place in model_places(model).items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def write_gguf(family: str, tensors: dict[str, Tensor], path: Path, kind: str) -> None:
    """The same as a GGUF file, matrices quantised to `kind`."""
    config = CONFIGS[family]
    architecture = ARCHITECTURES[config["model_type"]]
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": config["head_dim"],
        "rope.freq_base": config["rope_theta"],
    }
    if "num_experts" in config:
        values |= {"expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"]}
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    write(path, architecture, values, _to_gguf(tensors, architecture, config["head_dim"]), kind)


def _to_gguf(tensors: dict[str, Tensor], architecture: str, head_dim: int) -> Tensors:
    """Under GGUF's names, in its order, experts stacked."""
    out: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        layer, stem, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
        if architecture == "llama" and re.search(r"[qk]_proj", stem):
            tensor = torch.from_numpy(to_pairs(tensor.numpy(), head_dim))
        block = f"blk.{layer}." if layer else ""
        out.setdefault(f"{block}{BACK[re.sub(r'[.][0-9]+[.]', '.{}.', stem)]}.{kind}", []).append(tensor)
    return {n: (torch.stack(parts) if "_exps" in n else parts[0]).numpy() for n, parts in out.items()}
