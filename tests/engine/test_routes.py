"""Whatever way a request takes through the engine, in fp32 it gets the same greedy tokens, those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import GREEDY, Driver
from tiny import FAMILIES, greedy, make_checkpoint

NUM_OUTPUT = 32
PARAMS = replace(GREEDY, max_tokens=NUM_OUTPUT)


def _prompt(length: int, seed: int, vocab: int = 67) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (length,), generator=generator).tolist()


PROMPT = _prompt(75, 0)
OTHERS = [_prompt(5 + 9 * i, i + 1) for i in range(15)]

Checkpoint = tuple[Path, list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The folder of a family's tiny model, and the tokens that transformers gives for PROMPT."""
    made: dict[str, Checkpoint] = {}

    def get(family: str) -> Checkpoint:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = make_checkpoint(family, folder)
            made[family] = folder, greedy(model, PROMPT, NUM_OUTPUT)
        return made[family]

    return get


def _cuda(name: str, attention: str, fused_kernels: str = "off") -> Any:
    options = {"device": "cuda", "attention": attention, "fused_kernels": fused_kernels}
    return pytest.param(options, marks=pytest.mark.cuda, id=f"cuda-{name}")


@pytest.fixture(
    params=[
        pytest.param({"device": "cpu"}, id="cpu"),
        _cuda("torch_sdpa", "torch_sdpa"),
        _cuda("triton", "triton"),
        _cuda("triton-fused", "triton", "on"),
    ]
)
def device(request: pytest.FixtureRequest) -> dict[str, str]:
    """Where to run; with Triton's attention, decodes are replayed as CUDA graphs."""
    options: dict[str, str] = request.param
    return options | {"dtype": "float32"}


every_route = pytest.mark.parametrize("family", FAMILIES)
LAGS = pytest.mark.parametrize("overlap", [False, True], ids=["lag0", "lag1"])
PAGES = pytest.mark.parametrize("page_size", [1, 16])


@every_route
@LAGS
@PAGES
def test_engine_one_shot_and_prefix_hit(
    checkpoint: Callable[[str], Checkpoint], device: dict[str, str], family: str, overlap: bool, page_size: int
) -> None:
    folder, expected = checkpoint(family)
    driver = Driver(folder, **device, page_size=page_size, overlap=overlap, max_batched_tokens=512)
    first = driver.ask(PROMPT, PARAMS)
    assert max(map(max, driver.batches)) == len(PROMPT), "the prompt was computed at once"
    second = driver.ask(PROMPT, PARAMS)
    assert first.num_cached == 0
    assert second.num_cached == (len(PROMPT) - 1) // page_size * page_size
    assert first.tokens == expected
    assert second.tokens == expected
    driver.close()


@every_route
@LAGS
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_engine_chunked_prefill(
    checkpoint: Callable[[str], Checkpoint], device: dict[str, str], family: str, overlap: bool, chunk: int
) -> None:
    folder, expected = checkpoint(family)
    page_size = 16 if chunk != 7 else 1
    driver = Driver(
        folder,
        **device,
        page_size=page_size,
        overlap=overlap,
        max_batched_tokens=chunk,
        max_running=1,
    )
    answer = driver.ask(PROMPT, PARAMS)
    chunks = [counts[0] for counts in driver.batches]
    assert max(chunks) == chunk and sum(c == chunk for c in chunks) >= len(PROMPT) // chunk
    assert answer.tokens == expected
    driver.close()


@every_route
@LAGS
@PAGES
def test_engine_batched_with_others(
    checkpoint: Callable[[str], Checkpoint], device: dict[str, str], family: str, overlap: bool, page_size: int
) -> None:
    folder, expected = checkpoint(family)
    driver = Driver(
        folder,
        **device,
        page_size=page_size,
        overlap=overlap,
        max_batched_tokens=100,
        num_pages=3000 // page_size,
    )
    others = [driver.add(prompt, replace(PARAMS, max_tokens=40)) for prompt in OTHERS[:7]]
    ours = driver.add(PROMPT, PARAMS)
    others += [driver.add(prompt, replace(PARAMS, max_tokens=40)) for prompt in OTHERS[7:]]
    driver.run()
    assert max(map(len, driver.batches)) == 16, "all sixteen were in one step"
    assert any(1 in counts and max(counts) > 1 for counts in driver.batches), "prefill and decode were mixed"
    assert driver.answers[ours].tokens == expected
    assert all(len(driver.answers[id].tokens) == 40 for id in others)
    driver.close()


@every_route
@LAGS
@PAGES
def test_engine_preempted_and_resumed(
    checkpoint: Callable[[str], Checkpoint], device: dict[str, str], family: str, overlap: bool, page_size: int
) -> None:
    folder, expected = checkpoint(family)
    num_tokens = 2 * len(PROMPT) + NUM_OUTPUT  # two prompts fit, two answers don't
    driver = Driver(
        folder,
        **device,
        page_size=page_size,
        overlap=overlap,
        max_batched_tokens=512,
        num_pages=num_tokens // page_size,
    )
    older = driver.add(OTHERS[7][:60], replace(PARAMS, max_tokens=70))
    ours = driver.add(PROMPT, PARAMS)
    request = driver.engine.scheduler.requests[ours]
    driver.run()
    assert request.num_preemptions > 0
    assert driver.answers[ours].tokens == expected
    assert len(driver.answers[older].tokens) == 70
    driver.close()
