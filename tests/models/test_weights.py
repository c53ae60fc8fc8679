"""Loading safetensors: one file or many, the wrong ones refused by name; random weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from torch import Tensor

from minisgl.models.build import model_places
from minisgl.models.decoder import CausalLM
from minisgl.models.registry import load_model
from minisgl.types import ModelError

Checkpoint = Callable[[str], tuple[Path, Any]]


def load(folder: Path, **more: Any) -> CausalLM:
    return load_model(folder, torch.float32, torch.device("cpu"), progress=False, **more)


def parameters(model: CausalLM) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def same(a: CausalLM, b: CausalLM) -> bool:
    return all(torch.equal(x, parameters(b)[name]) for name, x in parameters(a).items())


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("llama")[0], tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2_window"])
def test_sharded_checkpoint_loads_as_a_single_one(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    make_checkpoint(family, tmp_path, shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(load(tmp_path), load(checkpoint(family)[0]))


def test_weights_land_in_merged_parameters(checkpoint: Checkpoint) -> None:
    folder, oracle = checkpoint("llama_bias")
    state, model = oracle.state_dict(), load(folder)
    layer = parameters(model)
    prefix = "model.layers.1."
    parts = [state[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(layer["layers.1.self_attn.qkv_proj.weight"], torch.cat(parts))
    parts = [state[f"{prefix}mlp.{p}_proj.bias"] for p in ("gate", "up")]
    assert torch.equal(layer["layers.1.mlp.gate_up_proj.bias"], torch.cat(parts))


def test_weights_take_the_type_asked_for(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama")[0], torch.bfloat16, torch.device("cpu"), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_tensors_nobody_needs_are_passed_over(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama_tied")[0], tmp_path / "model"))
    expected = load(folder)
    extra = {"lm_head.weight": torch.ones(97, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit(folder, lambda tensors: tensors.update(extra))
    assert same(load(folder), expected)


def test_missing_tensors_are_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks tensors that this model needs: model\.layers\.1\.self_attn\.k_proj"):
        load(folder)


def test_unexpected_tensors_are_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({f"adapter.{i}": torch.ones(1) for i in range(8)}))
    with pytest.raises(ModelError, match=r"no place for: adapter\.0, .* and 3 more"):
        load(folder)


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[65\]; the configuration makes it \[64\]"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20000])
def test_truncated_file_is_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors can't be read, it may be cut short"):
        load(folder)


def test_folder_without_weights_is_refused_with_a_way_on(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*--dummy-weights"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": []}}'])
def test_index_that_makes_no_sense_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is no readable index"):
        load(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-00001-of-00002\.safetensors"):
        load(folder)


def test_progress_is_shown_on_standard_error_alone(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(folder, torch.float32, torch.device("cpu"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading model" in err


def test_dummy_weights_need_only_a_configuration(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    a, b, c = load(folder, dummy=True, seed=1), load(folder, dummy=True, seed=1), load(folder, dummy=True, seed=2)
    assert same(a, b)
    assert not same(a, c)
    assert all(bool(torch.isfinite(p).all()) for p in a.parameters())
    assert parameters(a)["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert bool((parameters(a)["norm.weight"] == 1).all())


MEASURE = """
import re, sys, torch
from pathlib import Path
from minisgl.models.registry import load_model
torch.ones(64, 64) @ torch.ones(64, 64)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
model = load_model(Path(sys.argv[1]), torch.float32, torch.device("cpu"), progress=False)
print(peak() - before - sum(p.nbytes for p in model.parameters()))
"""


def test_loading_takes_little_memory_beside_the_model(tmp_path: Path) -> None:
    """A file of 200 MB in tensors of 8 MB at most, in a process of its own."""
    config: dict[str, Any] = {"model_type": "llama", "vocab_size": 2048, "max_position_embeddings": 64}
    config |= {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    places = model_places(load(tmp_path, dummy=True))
    save_file({name: torch.ones(place.shape) for name, place in places.items()}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 200e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    beside = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert beside < 80e6
