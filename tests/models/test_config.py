"""Reading shapes: config.json of several ages, and what is said when one can't be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.models.config import ModelConfig
from minisgl.models.registry import read_config
from minisgl.models.rotary import scaled_frequencies
from minisgl.types import ModelError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 64}


def read(folder: Path, config: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


def test_config_reads_a_published_llama(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"head_dim": None, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}})
    assert (config.family, config.num_layers, config.num_kv_heads, config.head_dim) == ("llama", 32, 8, 128)
    assert config.rope_theta == 500000.0
    assert config.windows == (None,) * 32
    assert not config.tie_embeddings
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position == 8192


def test_config_reads_old_and_new_rope_keys_alike(tmp_path: Path) -> None:
    old = LLAMA | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
    older = LLAMA | {"rope_scaling": LLAMA3 | {"type": "llama3"}}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0}
    assert read(tmp_path, old) == read(tmp_path, older) == read(tmp_path, new)


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({}, [None] * 4),
        ({"use_sliding_window": False, "max_window_layers": 0}, [None] * 4),
        ({"use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 64]),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 4),
        (
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            [64, None, 64, None],
        ),
    ],
)
def test_config_qwen2_windows(tmp_path: Path, more: dict[str, Any], windows: list[int | None]) -> None:
    assert list(read(tmp_path, QWEN2 | more).windows) == windows


def test_config_qwen3_moe_chooses_dense_layers(tmp_path: Path) -> None:
    source = LLAMA | {"model_type": "qwen3_moe", "num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 2}
    moe = read(tmp_path, source | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe
    assert moe is not None
    assert moe.dense_layers == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type is 'gpt2', which isn't supported; supported: llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing; expected a whole number from 1"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; expected a whole number from 1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number from 1"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf; expected a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"num_key_value_heads": 5}, "32 attention heads aren't a multiple of 5 key-value heads"),
        ({"head_dim": 33}, "head size is 33; rotary embedding needs an even one"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu is supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised for safetensors aren't supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type is 'longrope'.*supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1}}, "rope_scaling.factor is -1; expected a number above 0"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; expected an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differs by kind of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor isn't 1"),
    ],
)
def test_config_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, LLAMA | change)
    assert "config.json" in str(caught.value)


def test_config_refuses_layer_types_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layer_types is .*chunked_attention.*expected full_attention"):
        read(tmp_path, QWEN2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4})


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00"])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json (is no readable JSON|holds a list; expected an object)"):
        read_config(tmp_path)


def test_config_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        read_config(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3 | {"rope_type": "llama3"},
        LLAMA3 | {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 3.0},
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7},
        YARN | {"truncate": False},
        YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
        YARN | {"factor": 1.0},
    ],
    ids=str,
)
def test_rope_frequencies_equal_those_of_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    source = {k: v for k, v in LLAMA.items() if k not in ("model_type", "rope_theta")}
    oracle = LlamaConfig(**source, rope_parameters=rope | {"rope_theta": 500000.0})
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](oracle, torch.device("cpu"))
    config = read(tmp_path, LLAMA | {"rope_scaling": rope})
    assert config.rope_scaling is not None
    torch.testing.assert_close(scaled_frequencies(config), expected, rtol=1e-6, atol=0)
    assert config.rope_scaling.attention_factor == pytest.approx(factor)
