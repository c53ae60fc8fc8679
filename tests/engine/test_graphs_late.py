"""Decode steps on a device that does nothing until the host waits for it: whatever a step reads must keep till then."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import GREEDY, Driver
from test_graphs import PROMPTS, DeviceOnly, Replayed
from tiny import make_checkpoint

from minisgl.engine.graphs import Captured, DecodeGraphs, DecodeStep, batch_sizes
from minisgl.engine.runner import ModelRunner
from minisgl.types import FinishReason, SamplingParams

WAYS = [
    GREEDY,
    GREEDY,
    GREEDY,
    replace(GREEDY, temperature=0.9, seed=4),
    replace(GREEDY, temperature=1.0, top_p=0.8, top_k=20, seed=3),
    replace(GREEDY, presence_penalty=1.5),
]


class Stream:
    """Work in the order in which it was launched, done when somebody waits for its end."""

    def __init__(self) -> None:
        self.work: deque[Callable[[], object]] = deque()
        self.most = 0

    def launch(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        self.most = max(self.most, len(self.work))

    def run(self) -> None:
        while self.work:
            self.work.popleft()()


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.marker: Callable[[], object] | None = None

    def record(self) -> None:
        self.marker = lambda: None
        self.stream.launch(self.marker)

    def synchronize(self) -> None:
        while self.marker in self.stream.work:
            self.stream.work.popleft()()


class Late(DecodeGraphs):
    """The same steps without a GPU, `replay`ed late."""

    stream: Stream

    @torch.inference_mode()
    def _capture(self, step: DecodeStep, memory: Any) -> Any:
        self.mail.reset(step.size)
        logits = step.run()

        @torch.inference_mode()
        def again() -> None:
            logits.copy_(step.run())

        @torch.inference_mode()
        def filtered() -> None:
            step.sample(logits, True)

        plain: Any = Replayed(lambda: self.stream.launch(again))
        other: Any = Replayed(lambda: self.stream.launch(filtered))
        return Captured(step, plain, other, logits), None


def _late(folder: Path, **options: Any) -> tuple[Driver, Stream]:
    driver, stream = Driver(folder, attention="torch_sdpa", **options), Stream()
    runner: ModelRunner = driver.engine.runner
    runner.attention = DeviceOnly()
    Late.stream = stream
    graphs = Late(runner.model, runner.pool, runner.attention, runner.rows, batch_sizes(4), False)
    graphs.mail._done = [Event(stream) for _ in graphs.mail._words]  # type: ignore[misc]
    runner.graphs = graphs

    def behind_the_stream(owner: Any, name: str) -> None:  # what isn't a graph runs at once, so what came before must
        inner = getattr(owner, name)

        def call(*args: Any) -> Any:
            stream.run()
            return inner(*args)

        setattr(owner, name, call)

    for owner, name in ((runner, "_launch_varied"), (runner, "_sample"), (runner, "_admit")):
        behind_the_stream(owner, name)
    return driver, stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint("llama", path)
    return path


def _work(driver: Driver, seed: int) -> dict[str, tuple[list[int], SamplingParams]]:
    """Requests that come and go at random: what each asked."""
    rng = random.Random(seed)
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    while len(asked) < 14 or driver.engine.has_work:
        if len(asked) < 14 and rng.random() < 0.3:
            prompt, params = rng.choice(PROMPTS), replace(rng.choice(WAYS), max_tokens=rng.randrange(1, 40))
            asked[driver.add(prompt, params)] = prompt, params
        elif asked and rng.random() < 0.05:
            driver.engine.abort(rng.choice(list(asked)))
        driver.step()
    return asked


@pytest.mark.parametrize("overlap", [False, True], ids=["lag0", "lag1"])
@pytest.mark.parametrize("seed", range(3))
def test_steps_that_run_late_give_the_same_tokens(folder: Path, overlap: bool, seed: int) -> None:
    options: dict[str, Any] = {"page_size": 4, "max_running": 6, "max_batched_tokens": 16}
    driver, stream = _late(folder, overlap=overlap, num_pages=36, **options)
    asked = _work(driver, seed)
    driver.close()
    assert stream.most > 2, "the device lagged"
    assert driver.engine.stats().preemptions
    alone = Driver(folder, **options)
    for id, (prompt, params) in asked.items():
        answer, expected = driver.answers[id], alone.ask(prompt, params).tokens
        assert answer.tokens == (expected if answer.finish is FinishReason.LENGTH else expected[: len(answer.tokens)])
