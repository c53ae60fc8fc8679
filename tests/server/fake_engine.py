"""An engine without a model: it repeats each prompt, a token a step. Child processes of the tests import it by name."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, replace

from minisgl.config import EngineConfig
from minisgl.messages import EngineStats, TokenOutput
from minisgl.types import FinishReason, ModelError, RequestError, SamplingParams, TokenLogprob

NAME = "fake_engine:FakeEngine"
VOCAB_SIZE = 1000
NUM_PAGES = 100
POISON = 666  # a prompt with this token ends the engine
REFUSED = 13  # a prompt with this token is refused


@dataclass
class _Running:
    prompt: array[int]
    params: SamplingParams
    num_output: int = 0


class FakeEngine:
    """Token i of the answer is token i of the prompt, over and over, plus the seed. The log-probability of token t is
    -t / 8, and token 0 comes with it as the likelier one. The last part of `config.model` picks a mood: 'unloadable',
    'broken' (both fail at start), 'slow' (10 ms a step) or another name for a fast one."""

    max_total_tokens = 100_000
    vocab_size = VOCAB_SIZE

    def __init__(self, config: EngineConfig) -> None:
        if config.model == "unloadable":
            raise ModelError("there is no model at 'unloadable'; tried a folder and a file")
        if config.model == "broken":
            raise ValueError("broken on purpose")
        self.config = replace(config, device="cpu", dtype="float32")
        self._step_s = 0.01 if config.model.endswith("slow") else 0.0
        self._running: dict[str, _Running] = {}
        self._ended: list[TokenOutput] = []
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._ended)

    def add(self, request_id: str, prompt: array[int], params: SamplingParams, priority: int = 0) -> None:
        if REFUSED in prompt:
            raise RequestError(f"token {REFUSED} is refused on purpose", "prompt")
        self._running[request_id] = _Running(prompt, params)

    def finish(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        if self._running.pop(request_id, None) is not None:
            self._ended.append(TokenOutput(request_id, [], finish=FinishReason.ABORT))

    def step(self) -> list[TokenOutput]:
        outputs, self._ended = self._ended, []
        if self._running:
            time.sleep(self._step_s)
            self._steps += 1
        for request_id, running in list(self._running.items()):
            outputs.append(self._next(request_id, running))
        return outputs

    def _next(self, request_id: str, running: _Running) -> TokenOutput:
        if POISON in running.prompt:
            raise RuntimeError("poisoned")
        params, first = running.params, running.num_output == 0
        token = running.prompt[running.num_output % len(running.prompt)] + (params.seed or 0)
        running.num_output += 1
        tokens = [] if params.max_tokens == 0 else [token]
        ended = params.max_tokens is not None and running.num_output >= params.max_tokens
        if ended:
            del self._running[request_id]
        return TokenOutput(
            request_id,
            tokens,
            [_logprob(t) for t in tokens] if params.logprobs else [],
            FinishReason.LENGTH if ended else None,
            prompt_logprobs=[_logprob(t) for t in running.prompt[1:]] if params.prompt_logprobs and first else [],
        )

    def stats(self) -> EngineStats:
        running = len(self._running)
        return EngineStats(
            num_running=running, num_pages=NUM_PAGES, num_free_pages=NUM_PAGES - running, steps=self._steps
        )

    def close(self) -> None:
        """Nothing to end."""


def _logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, -token / 8, ((0, 0.0),))
