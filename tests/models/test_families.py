"""Every family against transformers: logits and greedy tokens, in float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from tiny import FAMILIES, greedy

from minisgl.models.decoder import CausalLM
from minisgl.models.registry import load_model

CPU = torch.device("cpu")
Checkpoint = Callable[[str], tuple[Path, Any]]


def load(folder: Path) -> CausalLM:
    return load_model(folder, torch.float32, CPU, progress=False)


def prompt(vocab: int, length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + length).randrange(vocab) for _ in range(length)]


def oracle_logits(oracle: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return oracle(torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit of its row."""
    return float(((ours - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 1, 7], ids=["whole", "chunks-of-1", "chunks-of-7"])
def test_logits_agree_with_transformers(checkpoint: Checkpoint, family: str, chunk: int | None) -> None:
    folder, oracle = checkpoint(family)
    ids = prompt(oracle.config.vocab_size, 90)
    ours = Loop(load(folder)).logits(ids, chunk)
    assert ours.dtype == torch.float32
    assert ours.shape == (90, oracle.config.vocab_size)
    assert error(ours, oracle_logits(oracle, ids)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_greedy_tokens_agree_when_batched(checkpoint: Checkpoint, family: str, page_size: int) -> None:
    folder, oracle = checkpoint(family)
    vocab = oracle.config.vocab_size
    prompts = [prompt(vocab, n) for n in (1, 5, 33, 34, 120)]
    ours = Loop(load(folder), page_size, num_pages=1024 // page_size).greedy(prompts, 64, chunk=13)
    assert ours == [greedy(oracle, p, 64) for p in prompts]


def test_greedy_tokens_differ_between_prompts(checkpoint: Checkpoint) -> None:
    """The oracle models must be able to tell routes apart, or the tests above prove little."""
    for family in FAMILIES:
        _, oracle = checkpoint(family)
        a, b = (greedy(oracle, prompt(oracle.config.vocab_size, 33, seed), 16) for seed in (1, 2))
        assert a != b, family


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "qwen3_moe"])
def test_logits_in_half_precision_stay_close(checkpoint: Checkpoint, family: str) -> None:
    folder, oracle = checkpoint(family)
    ids = prompt(oracle.config.vocab_size, 40)
    ours = Loop(load_model(folder, torch.bfloat16, CPU, progress=False)).logits(ids)
    expected = oracle_logits(oracle, ids)
    assert ours.dtype == torch.bfloat16
    assert float((ours - expected).norm() / expected.norm()) < 0.08


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_without_wanted_logits_returns_no_rows(checkpoint: Checkpoint, family: str) -> None:
    folder, _ = checkpoint(family)
    loop = Loop(load(folder))
    seq = loop.add([3, 4, 5])
    batch = loop._batch([(seq, 2)], want_all=False)
    batch.logits_indices = torch.zeros(0, dtype=torch.int64)
    assert loop.model.forward(batch).shape == (0, loop.model.config.vocab_size)


def test_last_layer_computes_no_more_than_the_wanted_rows(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("qwen3")
    loop, rows = Loop(load(folder)), []
    for layer in loop.model.layers:
        layer.mlp.register_forward_hook(lambda _module, given, _out: rows.append(given[0].shape[0]))
    work = [(loop.add([3, 4, 5, 6, 7]), 5), (loop.add([8, 9, 10]), 3)]
    logits = loop.model.forward(loop._batch(work, want_all=False))
    assert logits.shape[0] == 2
    assert rows == [8] * (len(rows) - 1) + [2] and len(rows) > 1
