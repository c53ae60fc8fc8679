"""Tiny random checkpoints of every family, written by transformers: what the tests compare minisgl with.

The shapes are awkward on purpose: odd vocabulary sizes, head sizes that aren't hidden / heads, GQA groups of 1, 3,
5, 7 and 8, windows smaller than the prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Build = Callable[[], Any]  # -> transformers PreTrainedConfig

MAX_POSITION = 512


def _shape(heads: int, kv_heads: int, head_dim: int, hidden: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_POSITION,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    } | more


def _llama(**kwargs: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**kwargs)


def _mistral(**kwargs: Any) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**kwargs)


def _qwen2(**kwargs: Any) -> Any:
    from transformers import Qwen2Config

    kwargs.pop("head_dim")  # Qwen2 has none of its own: hidden / heads
    return Qwen2Config(**kwargs)


def _qwen3(**kwargs: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**kwargs)


def _qwen3_moe(**kwargs: Any) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2, **kwargs)


def _rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **more}}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)

FAMILIES: dict[str, Build] = {
    "llama": lambda: _llama(**_shape(4, 4, 16, 64, 101)),
    "llama_tied": lambda: _llama(**_shape(6, 2, 8, 48, 97, tie_word_embeddings=True)),
    "llama_bias": lambda: _llama(**_shape(4, 2, 16, 64, 101, attention_bias=True, mlp_bias=True)),
    "llama3": lambda: _llama(**_shape(5, 1, 16, 40, 103, **_LLAMA3)),
    "llama_linear": lambda: _llama(**_shape(7, 1, 8, 56, 67, **_rope("linear", factor=4.0))),
    "llama_yarn": lambda: _llama(**_shape(8, 1, 16, 32, 127, **_YARN)),
    "mistral": lambda: _mistral(**_shape(6, 2, 16, 40, 113, sliding_window=11)),
    "qwen2": lambda: _qwen2(**_shape(7, 1, 8, 56, 109)),
    "qwen2_window": lambda: _qwen2(
        **_shape(
            6, 2, 8, 48, 107, use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True
        )
    ),
    "qwen3": lambda: _qwen3(**_shape(8, 1, 24, 40, 131, tie_word_embeddings=True)),
    "qwen3_yarn": lambda: _qwen3(**_shape(5, 5, 16, 32, 137, **_YARN)),
    "qwen3_moe": lambda: _qwen3_moe(**_shape(6, 2, 16, 40, 139, norm_topk_prob=True)),
    "qwen3_moe_mixed": lambda: _qwen3_moe(**_shape(4, 4, 8, 32, 149, mlp_only_layers=[0], num_hidden_layers=3)),
}


def _randomise(model: Any, seed: int) -> None:
    """Logits that lie far apart, norms around 1, biases that matter, and layers that outweigh the embedding.

    The last keeps a model with tied embeddings from repeating its input for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                scale = 0.4 if "embed" in name or "lm_head" in name else 2 * weight.shape[-1] ** -0.5
                weight.copy_(noise * scale)
            else:
                weight.copy_(noise * 0.2 + ("norm" in name))


def make_checkpoint(family: str, folder: Path, seed: int = 0, shard_size: str | None = None) -> Any:
    """Writes a random checkpoint of `family` (a key of FAMILIES) to `folder`.

    Args:
        shard_size: bytes a file at most, as transformers spells it ("20KB"); None: one file.

    Returns:
        The transformers model, float32, in eval mode: the oracle.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    _randomise(model, seed)
    hf_logging.disable_progress_bar()
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    return model


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """`num_tokens` greedy continuations of `prompt` by the oracle, end-of-text ids ignored."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return [int(t) for t in out[0, len(prompt) :]]
