"""Steps that hold prompts, padded to the shapes of graphs: the captured work, run as it is on a CPU, and replayed on a
GPU."""

from __future__ import annotations

import logging
import random
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import GREEDY, Driver
from test_graphs import DeviceOnly, Replayed, Uncaptured
from tiny import FAMILIES, greedy, make_checkpoint

from minisgl.engine.graphs import batch_sizes
from minisgl.engine.prompt_graphs import MOST_PROMPTS, PromptGraphs, PromptStep, decode_sizes, prompt_sizes
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.engine.steps import IN_FLIGHT, StepShape, lay_out
from minisgl.types import Request, SamplingParams

PROMPTS = [[(7 * i + 3 * k) % 60 + 2 for i in range(5 + 11 * k)] for k in range(5)]
PARAMS = replace(GREEDY, max_tokens=20)
LAGS = pytest.mark.parametrize("overlap", [False, True], ids=["lag0", "lag1"])


class UncapturedPrompts(PromptGraphs):
    """The same steps without a GPU; `replays` counts the shapes that were replayed."""

    replays: Counter[StepShape]

    def _capture(self, step: PromptStep) -> None:
        hidden = step.hidden = self.run(step).clone()  # a capture leaves no more than replays find: all of it is redone
        replays = self.__dict__.setdefault("replays", Counter())

        def replay() -> None:
            replays[step.shape] += 1
            hidden.copy_(self.run(step))

        step.graph = Replayed(replay)  # type: ignore[assignment]


def _driver(folder: Path, sizes: list[int], attention: Any = None, **options: Any) -> tuple[Driver, UncapturedPrompts]:
    """A driver whose steps go through uncaptured graphs, those with prompts too."""
    driver = Driver(folder, attention="torch_sdpa", **options)  # layers that ask the backend
    runner = driver.engine.runner
    runner.attention = attention or DeviceOnly()
    parts = runner.model, runner.pool, runner.attention, runner.rows
    with torch.inference_mode():
        runner.graphs = Uncaptured(*parts, batch_sizes(8), False)
    runner.prompt_graphs = prompts = UncapturedPrompts(*parts, sizes, 8, None)
    prompts.replays.clear()
    return driver, prompts


Made = dict[str, tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module")
def made() -> Made:
    return {}


@pytest.fixture
def oracle(family: str, made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    if family not in made:
        folder = tmp_path_factory.mktemp(family)
        model = make_checkpoint(family, folder)
        made[family] = folder, [greedy(model, prompt, 20) for prompt in PROMPTS]
    return made[family]


ALL = pytest.mark.parametrize("family", [f for f in FAMILIES if "moe" not in f])  # which asks the host on a CPU
ONE = pytest.mark.parametrize("family", ["mistral"])


@ALL
@pytest.mark.parametrize(("overlap", "page_size"), [(False, 1), (True, 4)], ids=["lag0", "lag1"])
def test_padded_steps_give_the_tokens_of_transformers(
    oracle: tuple[Path, list[list[int]]], overlap: bool, page_size: int
) -> None:
    """Whole prompts, chunks of them, prefix hits, and all of these beside decodes."""
    folder, expected = oracle
    driver, graphs = _driver(folder, [8, 24], overlap=overlap, page_size=page_size, max_batched_tokens=24)
    for _ in range(2):  # the second time over prefixes
        ids = [driver.add(prompt, PARAMS) for prompt in PROMPTS[:3]]
        for _ in range(6):
            driver.step()
        ids += [driver.add(prompt, PARAMS) for prompt in PROMPTS[3:]]
        driver.run()
        assert [driver.answers[id].tokens for id in ids] == expected
        assert not driver.engine.runner.rows.lengths[-1], "dummies keep to the first place of theirs"
    for i in (0, 0, 2, 2):
        assert driver.ask([65 - i, *PROMPTS[i]], PARAMS).tokens and driver.ask(PROMPTS[i], PARAMS).tokens == expected[i]
    assert any(n for _, n, _ in graphs.replays) and any(not n for _, n, _ in graphs.replays)
    assert {tokens - n for tokens, n, _ in graphs.replays} == {8, 24}
    driver.close()


@ONE
@LAGS
def test_padded_steps_survive_preemption(oracle: tuple[Path, list[list[int]]], overlap: bool) -> None:
    folder, expected = oracle
    driver, graphs = _driver(folder, [200], overlap=overlap, page_size=4, num_pages=28)
    ids = [driver.add(prompt, PARAMS) for prompt in PROMPTS]
    driver.run()
    assert driver.engine.stats().preemptions and graphs.replays
    assert [driver.answers[id].tokens for id in ids] == expected
    driver.close()


@ONE
def test_padding_longer_than_a_request_may_be_is_shared_out(oracle: tuple[Path, list[list[int]]]) -> None:
    folder, expected = oracle
    driver, graphs = _driver(folder, [8, 512, 10**6], page_size=4, max_model_len=40, max_batched_tokens=512)
    assert graphs.sizes == [8, 512], "there are dummies for so many tokens"
    ids = [driver.add(PROMPTS[1], PARAMS) for _ in range(3)]
    driver.run()
    driver.ask(PROMPTS[1], PARAMS)
    for _ in range(2):
        ids += [driver.add(PROMPTS[i], PARAMS) for i in (0, 1)]
        driver.run()
    assert all(driver.answers[id].tokens in expected[:2] for id in ids)
    driver.close()


WAYS = [
    replace(PARAMS, presence_penalty=1.5),
    replace(PARAMS, logprobs=True, top_logprobs=2),
    replace(PARAMS, temperature=1.0, top_p=0.8, top_k=20, seed=3),
    replace(PARAMS, temperature=0.9, seed=4),
    replace(PARAMS, prompt_logprobs=True),
]


@ONE
def test_padded_steps_serve_rows_that_want_more(oracle: tuple[Path, list[list[int]]]) -> None:
    """Filters, penalties, seeds and log-probabilities: the same answers as from eager steps."""
    folder, _ = oracle
    plain, (driver, graphs) = Driver(folder, max_batched_tokens=32), _driver(folder, [16, 32], max_batched_tokens=32)
    answers = []
    for one in (plain, driver):
        rng, ids = random.Random(0), []
        for params in WAYS + WAYS:
            ids.append(one.add(rng.choice(PROMPTS), params))
            one.step()
        one.run()
        answers.append([one.answers[id] for id in ids])
    assert graphs.replays
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]
    for read in (lambda o: o.logprobs, lambda o: o.prompt_logprobs):
        tops = [[[i for i, _ in e.top] for a in side for o in a.outputs for e in read(o)] for side in answers]
        assert tops[0] == tops[1]
        values = [[e.logprob for a in side for o in a.outputs for e in read(o)] for side in answers]
        assert values[0] and values[1] == pytest.approx(values[0], abs=1e-4)


@ONE
def test_steps_too_large_or_of_too_many_prompts_stay_eager(oracle: tuple[Path, list[list[int]]]) -> None:
    graphs = _driver(oracle[0], [16, 64], page_size=4)[1]

    def batch(decodes: int, prompts: list[int]) -> ScheduledBatch:
        counts = [1] * decodes + prompts
        requests: list[Any] = [None] * len(counts)
        return ScheduledBatch(0, requests, [0] * len(counts), counts, [True] * len(counts), decodes)

    assert graphs.decodes == [0, 8]
    assert graphs.fitting(batch(0, [16])) == (16, 0, MOST_PROMPTS)
    assert graphs.fitting(batch(1, [10, 7])) == (72, 8, 8 + MOST_PROMPTS)
    assert graphs.fitting(batch(1, [])) == (24, 8, 8 + MOST_PROMPTS)
    assert graphs.fitting(batch(9, [10])) is None
    assert graphs.fitting(batch(0, [65])) is None
    assert graphs.fitting(batch(0, [1] * MOST_PROMPTS)) is not None
    assert graphs.fitting(batch(0, [1] * (MOST_PROMPTS - 1))) is not None, "with a dummy for the last token"
    assert graphs.fitting(batch(0, [1] * (MOST_PROMPTS + 1))) is None


@ONE
def test_steps_go_on_without_graphs_when_a_capture_fails(
    oracle: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, expected = oracle
    driver, graphs = _driver(folder, [16, 64], page_size=4)
    monkeypatch.setattr(UncapturedPrompts, "_capture", PromptGraphs._capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr("minisgl.engine.prompt_graphs.captured", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert driver.ask(PROMPTS[1], PARAMS).tokens == expected[1]
    assert [r.getMessage() for r in caplog.records] == [
        "no more CUDA graphs of steps with prompts: CUDA out of memory."
    ]
    assert not graphs.replays


def test_layout_fills_up_with_dummies() -> None:
    def request(row: int, tokens: int) -> Request:
        made = Request(f"r{row}", array("i", range(tokens)), SamplingParams())
        made.row = row
        return made

    batch = ScheduledBatch(0, [request(3, 4), request(1, 9)], [4, 2], [1, 5], [True, False], 1)
    layout, places = lay_out(batch, StepShape(16, 2, 7), 9, 4)
    ids, positions, token_rows, rows, lens, starts = (x.tolist() for x in layout)
    assert ids == [IN_FLIGHT] * 2 + [2, 3, 4, 5, 6] + [IN_FLIGHT] * 9
    assert positions == [4, 0, 2, 3, 4, 5, 6, *range(4), *range(4), 0]
    assert token_rows == [3, 9] + [1] * 5 + [9] * 9
    assert rows == [3, 9, 1, 9, 9, 9, 9] and lens == [5, 1, 7, 4, 4, 1, 0]
    assert starts == [0, 1, 2, 7, 11, 15, 16, 16] and places.tolist() == [0, 2]
    assert all(x.dtype == np.int32 for x in layout)


def test_sizes_cover_what_a_step_may_have() -> None:
    sizes = prompt_sizes(16384, 1024)
    assert sizes[0] == 32 and sizes[-1] == 8192 and {1024, 1280, 2048} <= set(sizes)
    for tokens in range(64, 8193):
        room = next(s for s in sizes if s >= tokens)
        assert room <= (1.25 if tokens > 1024 else 2) * tokens
    assert prompt_sizes(16384, 4096)[-1] == 4096 and prompt_sizes(20, 4096) == [20]
    assert decode_sizes(256) == [0, 16, 64, 256] and decode_sizes(1) == [0, 1]


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", ["off", "on"])
@LAGS
def test_replayed_prompts_give_the_tokens_of_transformers(
    oracle: tuple[Path, list[list[int]]], fused: str, overlap: bool
) -> None:
    folder, expected = oracle
    options: dict[str, Any] = {"page_size": 4, "overlap": overlap, "fused_kernels": fused, "max_batched_tokens": 64}
    driver = Driver(folder, device="cuda", dtype="float32", attention="triton", **options)
    graphs = driver.engine.runner.prompt_graphs
    assert graphs is not None
    for _ in range(3):
        ids = [driver.add(prompt, PARAMS) for prompt in PROMPTS[:3]]
        for _ in range(6):
            driver.step()
        ids += [driver.add(prompt, PARAMS) for prompt in PROMPTS[3:]]
        driver.run()
        assert [driver.answers[id].tokens for id in ids] == expected
    for i in (0, 0, 2, 2):
        assert driver.ask([65 - i, *PROMPTS[i]], PARAMS).tokens and driver.ask(PROMPTS[i], PARAMS).tokens == expected[i]
    captured = [shape for shape, step in graphs.steps.items() if step.graph is not None]
    assert graphs.capturing and any(n for _, n, _ in captured) and any(not n for _, n, _ in captured)
    driver.close()


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["qwen3"])
def test_replayed_prompts_cost_the_host_few_launches(oracle: tuple[Path, list[list[int]]]) -> None:
    from test_steady_state import _count

    driver = Driver(oracle[0], device="cuda", dtype="bfloat16", attention="triton", prefix_cache=False, overlap=False)
    for _ in range(3):
        driver.ask(PROMPTS[3], replace(GREEDY, max_tokens=1))
    driver.add(PROMPTS[3], replace(GREEDY, max_tokens=1))
    calls = _count(driver, 1)
    assert calls["cudaGraphLaunch"] == 1, calls
    assert sum(n for name, n in calls.items() if "LaunchKernel" in name) <= 24, calls
    driver.close()
