"""Driving a real `Engine` in tests: requests in, tokens out, and a record of what every step did."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakMethod

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.messages import TokenOutput
from minisgl.types import FinishReason, SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    num_cached: int = 0
    error: str | None = None
    outputs: list[TokenOutput] = field(default_factory=list)


class Driver:
    """An engine whose pages are checked after every step; `batches` keeps each step's token counts."""

    def __init__(self, model: Path, **options: Any) -> None:
        options = {"device": "cpu", "max_running": 16, "num_pages": 256} | options
        self.engine = Engine(EngineConfig(model=str(model), **options))
        self.answers: dict[str, Answer] = {}
        self.batches: list[list[int]] = []
        self._count = 0
        batches, launch = self.batches, WeakMethod(self.engine.runner.launch)  # an engine let go is gone at once

        def record(batch: Any) -> Any:
            batches.append(list(batch.counts))
            method = launch()
            assert method is not None
            return method(batch)

        self.engine.runner.launch = record  # type: ignore[method-assign]

    def add(self, prompt: list[int], params: SamplingParams = GREEDY, eos: tuple[int, ...] = (), **options: Any) -> str:
        id = f"r{self._count}"
        self._count += 1
        self.answers[id] = Answer()
        self.engine.add(id, array("i", prompt), params.resolve({}, eos), **options)
        return id

    def step(self) -> None:
        for output in self.engine.step():
            answer = self.answers[output.id]
            assert answer.finish is None, "an output came after the terminal one"
            answer.tokens += output.tokens
            answer.outputs.append(output)
            answer.finish, answer.error = output.finish, output.error
            answer.num_cached = max(answer.num_cached, output.num_cached)
        self.engine.scheduler.check_integrity()

    def run(self, limit: int = 20_000) -> None:
        while self.engine.has_work:
            limit -= 1
            assert limit, "the engine makes no progress"
            self.step()

    def ask(self, prompt: list[int], params: SamplingParams = GREEDY, **options: Any) -> Answer:
        id = self.add(prompt, params, **options)
        self.run()
        return self.answers[id]

    def close(self) -> None:
        """Every page must be free or evictable when nothing runs."""
        stats = self.engine.stats()
        assert stats.num_free_pages + stats.num_evictable_pages == stats.num_pages
