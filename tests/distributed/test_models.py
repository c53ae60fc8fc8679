"""Models and samplers split over real processes give what one process gives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import model_bodies as bodies
import numpy as np
import pytest
import torch
from checkpoints import ARCHITECTURES, CONFIGS, VOCAB, write_folder, write_gguf
from worlds import run_world

from minisgl.distributed import TPGroup
from minisgl.kernels import cpu
from minisgl.types import SamplingParams

ONE = TPGroup()
KINDS = ("F16", "Q8_0", "Q4_1")  # of GGUF files
IDS = [(11 * i + 3) % VOCAB for i in range(40)]
EXPECTED = json.loads((Path(__file__).parent.parent / "expected" / "smollm2.json").read_text())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of every family, and GGUF files of those that the format knows, of one quantisation after another."""
    parent = tmp_path_factory.mktemp("models")
    paths = []
    for i, (family, config) in enumerate(CONFIGS.items()):
        tensors = write_folder(family, parent / family)
        paths.append(parent / family)
        if config["model_type"] in ARCHITECTURES and "mlp_only_layers" not in config:
            for kind in {"F32", KINDS[i % len(KINDS)]}:
                paths.append(parent / f"{family}-{kind}.gguf")
                write_gguf(family, tensors, paths[-1], kind)
    return paths


def prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + length).randrange(VOCAB) for _ in range(length)]


def error(ours: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest logit of its row."""
    return float((np.abs(ours - expected).max(-1) / np.abs(expected).max(-1)).max())


def request(length: int, number: int, **params: Any) -> tuple[list[int], SamplingParams]:
    return prompt(length, number), SamplingParams(**{"max_tokens": 9, "seed": number, "ignore_eos": True} | params)


REQUESTS = [
    request(20, 1, temperature=0.0),
    request(41, 2, temperature=0.0, logprobs=True, top_logprobs=3, prompt_logprobs=True),
    request(1, 3, temperature=0.9),
    request(17, 4, temperature=1.0, top_k=5),
    request(5, 5, temperature=0.8, top_p=0.8, logprobs=True),
    request(5, 6, temperature=0.7, repetition_penalty=1.3, min_p=0.05),
    request(41, 2, temperature=0.0),
]
OPTIONS = {"attention": "torch_sdpa", "page_size": 4, "num_pages": 22, "max_batched_tokens": 32, "max_running": 5}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_give_the_logits_of_one(models: list[Path], size: int) -> None:
    """Every family, from safetensors and from GGUF; key-value heads shared, blocks cut, ranges without an id."""
    paths = models if size < 8 else models[::2]  # eight processes on a small machine take their time
    expected = bodies.logits(ONE, paths, IDS)
    first, *others = run_world(size, bodies.logits, paths, IDS)
    for path, ours, one in zip(paths, first, expected, strict=True):
        assert one.shape == (len(IDS), VOCAB)
        assert error(ours, one) < 1e-5, path
    for rank in others:
        assert all(np.array_equal(a, b) for a, b in zip(rank, first, strict=True))


def check_answers(ours: list[bodies.Answer], expected: list[bodies.Answer]) -> None:
    for (tokens, logprobs, of_prompt), (their_tokens, theirs, their_prompt) in zip(ours, expected, strict=True):
        assert tokens == their_tokens
        for entry, other in zip(logprobs + of_prompt, theirs + their_prompt, strict=True):
            assert entry.token_id == other.token_id and [t for t, _ in entry.top] == [t for t, _ in other.top]
            values = [entry.logprob, *(value for _, value in entry.top)]
            assert values == pytest.approx([other.logprob, *(value for _, value in other.top)], abs=1e-4)


@pytest.mark.parametrize(("size", "families"), [(2, list(CONFIGS)), (4, list(CONFIGS)), (8, ["qwen3_moe_mixed"])])
def test_ranks_give_the_tokens_of_one(models: list[Path], size: int, families: list[str]) -> None:
    """Greedy and drawn ones, in mixed steps that preempt and hit prefixes; each rank runs the whole engine."""
    folders = [path for path in models if path.name in families]
    expected = bodies.answers(ONE, folders, REQUESTS, OPTIONS)
    assert all(preempted and cached for _, preempted, cached in expected)
    for rank in run_world(size, bodies.answers, folders, REQUESTS, OPTIONS):
        for (ours, *counts), (one, *their_counts) in zip(rank, expected, strict=True):
            check_answers(ours, one)
            assert counts == their_counts


needs_extension = pytest.mark.skipif(not cpu.available(), reason="needs the C++ extension")


@needs_extension
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_packed_weights_give_the_logits_of_one(models: list[Path], size: int) -> None:
    """Blocks of GGUF stay packed where a slice has whole ones; the layers run one by one, and one rank's in C++."""
    expected = bodies.logits(ONE, models, IDS, "cpu")
    for path, ours, one in zip(models, run_world(size, bodies.logits, models, IDS, "cpu")[0], expected, strict=True):
        assert error(ours, one) < 1e-5, path


@needs_extension
def test_smollm2_on_three_ranks_keeps_its_greedy_tokens(smollm2: Path) -> None:
    """9 attention heads and 3 key-value heads; what transformers answers."""
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    cases = EXPECTED["cases"][:4]
    requests = [(case["prompt_token_ids"], greedy) for case in cases]
    expected = [case["output_token_ids"][:10] for case in cases]
    for rank in run_world(3, bodies.answers, [smollm2], requests, {"num_pages": 200, "max_running": 8}):
        assert [tokens for tokens, *_ in rank[0][0]] == expected


gpus = pytest.mark.parametrize("size", [n for n in (2, 4, 8) if n <= torch.cuda.device_count()] or [2])
enough = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.cuda
@enough
@gpus
def test_gpus_give_the_logits_of_one(models: list[Path], size: int) -> None:
    """Through NCCL, the range form of the embedding's kernel and the fused layers, in float32."""
    (expected,) = run_world(1, bodies.logits, models, IDS, "triton", True, device="cuda")
    first, *others = run_world(size, bodies.logits, models, IDS, "triton", True, device="cuda")
    for path, ours, one in zip(models, first, expected, strict=True):
        assert error(ours, one) < 1e-5, path
    for rank in others:
        assert all(np.array_equal(a, b) for a, b in zip(rank, first, strict=True))


@pytest.mark.cuda
@enough
@gpus
def test_gpus_give_the_tokens_of_one(models: list[Path], size: int) -> None:
    """The whole engine, decodes and their samplers from CUDA graphs."""
    folders = [path for path in models if path.name in CONFIGS]
    options = OPTIONS | {"device": "cuda", "dtype": "float32", "attention": "triton"}
    (expected,) = run_world(1, bodies.answers, folders, REQUESTS, options, device="cuda")
    for rank in run_world(size, bodies.answers, folders, REQUESTS, options, device="cuda"):
        for (ours, *counts), (one, *their_counts) in zip(rank, expected, strict=True):
            check_answers(ours, one)
            assert counts == their_counts
