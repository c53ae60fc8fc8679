"""A model made of arithmetic: its KV cache holds token ids, its next token is a hash of all it reads there.

A page handed to two owners, a stale page, a wrong position or a lost token changes what is read, and so the output.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from dataclasses import dataclass

import numpy as np

from minisgl.cache.prefix import make_prefix_cache
from minisgl.engine.scheduler import ScheduledBatch, Scheduler
from minisgl.types import FinishReason, Request, RequestStatus, SamplingParams

VOCAB = 50


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(array("i", tokens).tobytes()) % VOCAB


def expected_output(prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    """What any engine must answer."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


@dataclass
class Launched:
    batch: ScheduledBatch
    tokens: list[int]
    pages: dict[str, set[int]]  # touched, by request


class Simulation:
    """The engine's loop around a scheduler and the arithmetic model, checking every page after every step."""

    def __init__(self, num_pages: int, page_size: int, lag: int, **options: object) -> None:
        settings: dict = dict(max_running=4, max_batched_tokens=16, max_model_len=10_000, policy="fcfs") | options
        use_cache = settings.pop("prefix_cache", True)
        cache = make_prefix_cache(page_size, settings.pop("implementation", "auto")) if use_cache else None
        self.scheduler = Scheduler(num_pages, page_size, cache=cache, **settings)
        self.lag = lag
        self.kv = np.full(num_pages * page_size, -1, np.int64)
        self.last_token = np.zeros(settings["max_running"], np.int64)
        self.in_flight: deque[Launched] = deque()
        self.output: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.max_chunk = 0
        self.num_mixed = 0
        self.num_preempted_in_flight = 0

    def add(
        self, id: str, prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = (), priority: int = 0
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_ids, temperature=0.0)
        request = Request(id, array("i", prompt), params, priority)
        self.scheduler.add(request)
        self.output[id] = []
        return request

    def step(self) -> None:
        batch = self.scheduler.schedule()
        self.num_preempted_in_flight += sum(r.num_total > len(r.tokens) for r in batch.preempted)
        if batch.requests:
            self.in_flight.append(self._launch(batch))
        while len(self.in_flight) > (self.lag if batch.requests else 0):
            self._collect(self.in_flight.popleft())
        self.scheduler.check_integrity()

    def run(self, limit: int = 100_000) -> None:
        while self.scheduler.requests or self.in_flight:
            limit -= 1
            assert limit, "the engine makes no progress"
            self.step()

    def finish(self, id: str, reason: FinishReason) -> None:
        self.scheduler.finish(self.scheduler.requests[id], reason)
        self.ended[id] = reason
        self.scheduler.check_integrity()

    def _launch(self, batch: ScheduledBatch) -> Launched:
        launched = Launched(batch, [], {})
        assert batch.num_tokens <= self.scheduler.max_batched_tokens
        assert all(count == 1 for count in batch.counts[: batch.num_decodes])
        self.max_chunk = max(self.max_chunk, *batch.counts)
        self.num_mixed += 0 < batch.num_decodes < len(batch.requests)
        size = self.scheduler.page_size
        rows = zip(batch.requests, batch.starts, batch.counts, strict=True)
        for request, start, count in rows:  # all keys are stored before any attention, as in a real layer
            assert request.status is RequestStatus.RUNNING
            for position in range(start, start + count):
                known = position < len(request.tokens)
                token = request.tokens[position] if known else int(self.last_token[request.row])
                page = request.pages[position // size]
                self._check_unused(page, request.id)
                self.kv[page * size + position % size] = token
        for i, (request, start, count) in enumerate(zip(batch.requests, batch.starts, batch.counts, strict=True)):
            slots = [request.pages[p // size] * size + p % size for p in range(start + count)]
            launched.pages[request.id] = {slot // size for slot in slots}
            if batch.samples[i]:
                read = self.kv[slots].tolist()
                assert batch.output_index[i] == len(read) - request.num_prompt
                launched.tokens.append(next_token(read))
                self.last_token[request.row] = launched.tokens[-1]
        return launched

    def _check_unused(self, page: int, writer: str) -> None:
        """A page that is written mustn't be one that a step in flight uses for another request."""
        for launched in self.in_flight:
            for id, pages in launched.pages.items():
                assert id == writer or page not in pages, f"{writer} writes page {page}, in flight for {id}"

    def _collect(self, launched: Launched) -> None:
        for request in self.scheduler.collect(launched.batch, launched.tokens):
            assert request.id not in self.ended, "a token came after the end"
            self.output[request.id].append(request.tokens[-1])
            if request.finish_reason is not None:
                self.ended[request.id] = request.finish_reason
