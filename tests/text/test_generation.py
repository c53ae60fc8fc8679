"""End-of-text ids and sampling defaults."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from minisgl.text import load_text
from minisgl.text.generation import from_gguf
from minisgl.types import SamplingParams

CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}  # </s> is id 2 of the trained vocabularies


@pytest.mark.parametrize(
    ("generation_config", "model_config", "expected"),
    [
        ({"eos_token_id": 3}, {}, (3, 2)),
        ({"eos_token_id": [3, 2, 5]}, {}, (3, 2, 5)),
        ({}, {}, (2,)),
        (None, {"eos_token_id": [9]}, (9, 2)),
        ({"eos_token_id": 3}, {"eos_token_id": 9}, (3, 2)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": -1}, {}, (2,)),
    ],
)
def test_folder_collects_every_end_of_text_id(generation_config, model_config, expected, byte_level, save) -> None:
    files = {"tokenizer_config": CONFIG, "config": model_config}
    if generation_config is not None:
        files["generation_config"] = generation_config
    assert load_text(save(byte_level, **files)).generation.eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0.7, "top_k": 20, "min_p": 0.1}, {"temperature": 0.7, "top_k": 20, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": False}, {}),
        ({"max_new_tokens": 20, "top_k": None}, {}),
        (None, {}),
    ],
)
def test_folder_sampling_defaults_apply_where_the_file_means_them(config: Any, expected, byte_level, save) -> None:
    files = {} if config is None else {"generation_config": config}
    defaults = load_text(save(byte_level, **files)).generation.sampling
    assert defaults == expected
    resolved = SamplingParams(top_p=0.5).resolve(defaults, ())
    assert resolved.temperature == expected.get("temperature", 1.0)
    assert resolved.top_p == 0.5


def test_folder_default_out_of_range_is_ignored_with_a_warning(byte_level, save, caplog) -> None:
    folder = save(byte_level, generation_config={"temperature": "hot", "top_p": 0.9})
    with caplog.at_level(logging.WARNING):
        assert load_text(folder).generation.sampling == {"top_p": 0.9}
    assert "temperature" in caplog.text


def test_gguf_end_of_text_ids_come_from_keys_and_known_control_tokens() -> None:
    metadata = {
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eom_token_id": 4,
        "tokenizer.ggml.tokens": ["<|eot_id|>", "</s>", "<|im_end|>", "<|im_start|>", "x"],
        "tokenizer.ggml.token_type": [1, 3, 3, 3, 3],
    }
    assert from_gguf(metadata).eos_token_ids == (1, 4, 2)
