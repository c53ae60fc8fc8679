"""Qwen3-MoE through the Triton kernels against transformers, in float32: interpreted, and (marked cuda) on a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from tiny import greedy

from minisgl.kernels.moe import op
from minisgl.models.decoder import CausalLM, DecoderLayer
from minisgl.models.qwen3_moe import MixtureOfExperts
from minisgl.models.registry import load_model
from minisgl.profiling.skinny import switch

pytest.importorskip("triton")

Checkpoint = Callable[[str], tuple[Path, Any]]
MODELS = ("qwen3_moe", "qwen3_moe_mixed")  # probabilities normalised; a dense layer, not normalised
INTERPRETED = not torch.cuda.is_available()


def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    """On the GPU; without one, with the kernels interpreted."""
    model = load_model(folder, torch.float32, torch.device("cpu" if INTERPRETED else "cuda"), progress=False)
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    assert layers and model.capturable != INTERPRETED
    if INTERPRETED:
        from minisgl.kernels.moe import triton_v1

        monkeypatch.setattr(op, "moe", triton_v1.run)
        for layer in layers:
            layer.fused = True
    return model


def compare(folder: Path, oracle: Any, model: CausalLM, tokens: int) -> None:
    vocab = oracle.config.vocab_size
    ids = [random.Random(3).randrange(vocab) for _ in range(tokens)]
    with torch.no_grad():
        want = oracle(torch.tensor([ids])).logits[0]
    got = Loop(model).logits(ids, chunk=7).cpu()
    assert float(((got - want).abs().amax(-1) / want.abs().amax(-1)).max()) < 1e-4
    prompts = [ids[:n] for n in (1, 5, 13)]
    assert Loop(model).greedy(prompts, 8) == [greedy(oracle, p, 8) for p in prompts]


@pytest.mark.skipif(not INTERPRETED, reason="the tests marked cuda do more")
@pytest.mark.parametrize("family", MODELS)
def test_interpreted_logits_agree_with_transformers(
    checkpoint: Checkpoint, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, oracle = checkpoint(family)
    compare(folder, oracle, load(folder, monkeypatch), 20)


@pytest.mark.skipif(not INTERPRETED, reason="the engine's test below does it")
@pytest.mark.parametrize("family", MODELS)
def test_experts_are_added_to_the_residual_stream(
    checkpoint: Checkpoint, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, oracle = checkpoint(family)
    model = load(folder, monkeypatch)
    switch([layer for layer in model.layers if isinstance(layer, DecoderLayer)], True)
    compare(folder, oracle, model, 20)


@pytest.mark.cuda
@pytest.mark.parametrize("family", MODELS)
def test_logits_agree_with_transformers(checkpoint: Checkpoint, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, oracle = checkpoint(family)
    compare(folder, oracle, load(folder, monkeypatch), 200)


@pytest.mark.cuda
@pytest.mark.parametrize("family", MODELS)
def test_engine_with_graphs_gives_the_tokens_of_the_engine_without(checkpoint: Checkpoint, family: str) -> None:
    from array import array

    from minisgl.config import EngineConfig
    from minisgl.engine.engine import Engine
    from minisgl.types import SamplingParams

    torch.backends.cuda.matmul.allow_tf32 = False
    folder, oracle = checkpoint(family)
    prompts = [array("i", range(3, 3 + n)) for n in (1, 4, 9, 30)]
    answers = []
    for graphs in (True, False):
        config = EngineConfig(
            str(folder), device="cuda", dtype="float32", attention="triton", num_pages=200, max_running=4,
            cuda_graph=graphs,
        )  # fmt: skip
        engine = Engine(config)
        assert (engine.runner.graphs is not None) == graphs
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True).resolve({}, [])
        tokens: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            engine.add(str(i), prompt, params)
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.id, []).extend(output.tokens)
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert [answers[0][str(i)] for i in range(4)] == [greedy(oracle, list(p), 24) for p in prompts]
