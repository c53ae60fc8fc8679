"""Layers of skinny_gemm give the logits of the layers they stand in for; on the CPU with the kernel's reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from torch import Tensor

from minisgl.kernels.skinny_gemm import ladder
from minisgl.kernels.skinny_gemm.cases import reference
from minisgl.kernels.tuning import Config
from minisgl.models.registry import load_model
from minisgl.profiling.skinny import DEFAULT, Choices, install

Checkpoint = Callable[[str], tuple[Path, Any]]
CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of skinny_gemm, which runs as its reference."""
    made: list[int] = []

    def run(x: Tensor, *args: Any, config: Config) -> None:
        made.append(x.shape[0])
        reference(x, *args)

    monkeypatch.setattr(ladder, "skinny_gemm", run)
    return made


@pytest.mark.parametrize("cublas", [False, True], ids=["ours", "some by cuBLAS"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "mistral"])
def test_skinny_layers_give_the_same_logits(
    checkpoint: Checkpoint, calls: list[int], family: str, cublas: bool
) -> None:
    folder, oracle = checkpoint(family)
    ids = [(7 * i) % oracle.config.vocab_size for i in range(90)]
    expected = Loop(load_model(folder, torch.float32, CPU, progress=False)).logits(ids)
    model = load_model(folder, torch.float32, CPU, progress=False)
    qkv = model.layers[0].self_attn.qkv_proj.weight
    choices = Choices({(*qkv.shape, 1): None}) if cublas else Choices()
    assert install(model, choices) == model.config.num_layers
    for chunk in (1, 64, 90):
        calls.clear()
        torch.testing.assert_close(Loop(model).logits(ids, chunk), expected, rtol=1e-4, atol=1e-4)
        assert (not calls) if chunk == 90 else max(calls) == chunk, "more rows than the kernel takes"


def test_layers_that_do_not_fit_stay_as_they_are(checkpoint: Checkpoint) -> None:
    for family, fit in (("llama_bias", 0), ("qwen2", 0), ("qwen3_moe", 0), ("qwen3_moe_mixed", 1)):
        folder, _ = checkpoint(family)
        assert install(load_model(folder, torch.float32, CPU, progress=False)) == fit


def test_mixed_layers_hand_the_stream_over(checkpoint: Checkpoint, calls: list[int]) -> None:
    """The first layer is dense, those behind it have experts."""
    folder, oracle = checkpoint("qwen3_moe_mixed")
    ids = [(5 * i) % oracle.config.vocab_size for i in range(40)]
    expected = Loop(load_model(folder, torch.float32, CPU, progress=False)).logits(ids)
    model = load_model(folder, torch.float32, CPU, progress=False)
    install(model)
    torch.testing.assert_close(Loop(model).logits(ids), expected, rtol=1e-4, atol=1e-4)
    assert calls


def test_choices_are_the_fastest_that_did_all_the_work(tmp_path: Path) -> None:
    def row(batch: int, **us: float) -> dict[str, Any]:
        variants = [{"variant": name, "us": {"median": value}} for name, value in us.items() if name != "v2"]
        variants.append({"variant": "v2", "us": {"median": us["v2"]}, "config": [128, 2]})
        return {"n": 64, "k": 32, "tokens": batch, "variants": variants}

    rows = [row(1, cublas=1.0, engine=3.0, v2=2.0), row(16, cublas=1.0, engine=1.5, v2=2.0)]
    (tmp_path / "gemm.jsonl").write_text("{}\n" + json.dumps({"rows": rows}) + "\n")
    choices = Choices.read(tmp_path / "gemm.jsonl")
    assert choices.find(64, 32, 4) == Config(128, 2)
    assert choices.find(64, 32, 60) is None
    assert choices.find(64, 96, 1) == DEFAULT


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_skinny_layers_on_a_gpu_stay_close(batch: int, tmp_path: Path) -> None:
    """In bfloat16, with the fused kernels around it, from a graph, beside the same model in float32."""
    from minisgl.config import EngineConfig
    from minisgl.engine.engine import Engine
    from minisgl.profiling.shapes import shape_folder

    def logits(dtype: str, skinny: bool) -> Tensor:
        with shape_folder("smollm2") as folder:
            config = EngineConfig(str(folder), dummy_weights=True, dtype=dtype, num_pages=300, cuda_graph=False)
            engine = Engine(config)
        if skinny:
            assert install(engine.model) == engine.model.config.num_layers
        loop = Loop(engine.model)
        sequences = [loop.add([3 + i, 5, 7 + i]) for i in range(batch)]
        for _ in range(2):
            loop.step([(s, 1) for s in sequences])
        return loop.step([(s, 1) for s in sequences]).float()

    exact, plain, ours = logits("float32", False), logits("bfloat16", False), logits("bfloat16", True)
    error = (ours - exact).norm() / exact.norm()
    assert error < 2 * (plain - exact).norm() / exact.norm() + 1e-3
