"""GGUF files, written here from tiny checkpoints the way llama.cpp converts them, against the oracle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import Tensors, metadata, to_gguf, write
from loop import Loop

from minisgl.models.decoder import CausalLM
from minisgl.models.registry import load_model
from minisgl.types import ModelError

Checkpoint = Callable[[str], tuple[Path, Any]]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))


def load(path: Path) -> CausalLM:
    return load_model(path, torch.float32, torch.device("cpu"), progress=False)


def error(path: Path, oracle: Any) -> float:
    ids = [(11 * i + 3) % oracle.config.vocab_size for i in range(70)]
    ours = Loop(load(path)).logits(ids)
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    return float((ours - expected).norm() / expected.norm())


FAMILIES = ["llama", "llama_tied", "llama_bias", "mistral", "qwen2", "qwen3", "qwen3_yarn", "qwen3_moe", "llama_linear"]


def architecture_of(family: str) -> str:
    return next(a for name, a in reversed(ARCHITECTURES.items()) if family.startswith(name))


def rope_metadata(oracle: Any) -> dict[str, Any]:
    rope, out = oracle.config.rope_parameters, {}
    if rope["rope_type"] in ("linear", "yarn"):
        out = {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        out["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_logits_agree_with_the_checkpoint_it_came_from(
    checkpoint: Checkpoint, tmp_path: Path, family: str
) -> None:
    _, oracle = checkpoint(family)
    architecture = architecture_of(family)
    values = metadata(oracle, architecture) | rope_metadata(oracle)
    if family == "mistral":
        values["attention.sliding_window"] = oracle.config.sliding_window
    write(tmp_path / "m.gguf", architecture, values, to_gguf(oracle, architecture))
    assert error(tmp_path / "m.gguf", oracle) < 1e-4


def test_gguf_rope_factors_stand_for_llama3_scaling(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, oracle = checkpoint("llama3")
    plain = 5000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = (plain / oracle.model.rotary_emb.inv_freq).float().numpy()
    tensors = to_gguf(oracle, "llama") | {"rope_freqs.weight": factors}
    write(tmp_path / "m.gguf", "llama", metadata(oracle, "llama"), tensors)
    assert error(tmp_path / "m.gguf", oracle) < 1e-4


@pytest.mark.parametrize(
    ("kind", "most"), [("F16", 0.01), ("BF16", 0.05), ("Q8_0", 0.05), ("Q5_1", 0.3), ("Q4_0", 0.6)]
)
def test_gguf_types_are_dequantised(checkpoint: Checkpoint, tmp_path: Path, kind: str, most: float) -> None:
    """Llama's rows of 64 divide into blocks of 32; the error is the type's own."""
    _, oracle = checkpoint("llama")
    write(tmp_path / "m.gguf", "llama", metadata(oracle, "llama"), to_gguf(oracle, "llama"), kind)
    assert 0 < error(tmp_path / "m.gguf", oracle) < most


def small(oracle: Any, path: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    values = metadata(oracle, "llama") | changes
    values = {key: value for key, value in values.items() if value is not None}
    write(path, "llama", values, to_gguf(oracle, "llama") if tensors is None else tensors)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, r"llama\.block_count is missing"),
        ({"embedding_length": "wide"}, r"llama\.embedding_length is 'wide'; expected a whole number"),
        ({"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type is 'longrope', which isn't supported"),
        ({"rope.dimension_count": 8}, r"rope\.dimension_count differs from the head size 16"),
        ({"expert_count": 8}, "a mixture of experts isn't supported for llama"),
    ],
)
def test_gguf_metadata_that_can_not_be_used_is_named(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = small(checkpoint("llama")[1], tmp_path / "m.gguf", **changes)
    with pytest.raises(ModelError, match=message):
        load(path)


def test_gguf_of_an_unknown_architecture_names_those_supported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "gemma", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(
        ModelError, match=r"is 'gemma', which isn't supported; supported: llama, qwen2, qwen3, qwen3moe"
    ):
        load(tmp_path / "m.gguf")


def test_gguf_missing_unexpected_and_misshapen_tensors_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    oracle = checkpoint("llama")[1]
    tensors = to_gguf(oracle, "llama")
    without = {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"}
    with pytest.raises(ModelError, match=r"needs: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(small(oracle, tmp_path / "a.gguf", without))
    with pytest.raises(ModelError, match=r"no place for: blk\.0\.attn_sinks\.weight"):
        load(small(oracle, tmp_path / "b.gguf", tensors | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}))
    with pytest.raises(ModelError, match=r"output_norm\.weight has shape \[63\]; the configuration makes it \[64\]"):
        load(small(oracle, tmp_path / "c.gguf", tensors | {"output_norm.weight": np.ones(63, np.float32)}))


def test_gguf_cut_short_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = small(checkpoint("llama")[1], tmp_path / "m.gguf")
    for keep in (10, 1000, path.stat().st_size - 100):
        short = tmp_path / f"{keep}.gguf"
        short.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ModelError, match=str(short)):
            load(short)


def test_gguf_header_cached_under_a_relative_name_serves_from_anywhere(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small(checkpoint("llama")[1], tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    load(Path("m.gguf"))
    monkeypatch.chdir(os.sep)
    load(path)
