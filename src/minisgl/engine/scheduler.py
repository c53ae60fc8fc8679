"""Which tokens to compute next: pure policy over pages and counts. No tensors.

One rule, no phases: a step hands out a budget of tokens, first one to every request that decodes, then chunks of
prompts. Whatever a request lacks, tokens that aren't computed, is what it still wants.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

import numpy as np

from minisgl.cache.prefix import PrefixCache
from minisgl.engine.ledger import PageLedger
from minisgl.types import FinishReason, Request, RequestError, RequestStatus

LOOK_AHEAD = 16  # waiting requests examined behind a blocked one
MAX_BYPASS = 64  # admissions that may overtake a blocked request before it holds up everyone
LPM_WINDOW = 64  # waiting requests that the policy 'lpm' sorts


@dataclass(slots=True)
class ScheduledBatch:
    """What one step computes: parallel lists over requests, those with a single token first.

    `samples[i]` says whether the step samples a token for request i.
    """

    step: int
    requests: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # first position computed
    counts: list[int] = field(default_factory=list)  # positions computed
    samples: list[bool] = field(default_factory=list)
    num_decodes: int = 0  # leading requests with one token
    grown: list[tuple[int, int]] = field(default_factory=list)  # places of decodes that gained a page, and the page
    ending: list[Request] = field(default_factory=list)  # sample their last token
    admitted: list[Request] = field(default_factory=list)  # got a row in this step
    preempted: list[Request] = field(default_factory=list)
    stalled: list[Request] = field(default_factory=list)  # wait for pages that an unfinished step still holds

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def sampled(self) -> list[Request]:
        """The requests for which the step samples a token."""
        return (
            self.requests if all(self.samples) else [r for r, s in zip(self.requests, self.samples, strict=True) if s]
        )

    @property
    def output_index(self) -> list[int]:
        """Which output token of its request each sampled one is."""
        ends = zip(self.requests, self.starts, self.counts, strict=True)
        return [start + count - r.num_prompt for r, start, count in ends]


def _order(request: Request) -> tuple[int, int]:
    return (-request.priority, request.arrival)


class Scheduler:
    """Owns requests, rows and pages. Call `schedule`, launch the batch, and `collect` its tokens, in order.

    Up to `lag` + 1 batches may be under way; pages and rows given up meanwhile return when the last step that could
    touch them is collected.
    """

    def __init__(
        self, num_pages: int, page_size: int, max_running: int, max_batched_tokens: int, max_model_len: int,
        cache: PrefixCache | None, policy: str = "fcfs",
    ) -> None:  # fmt: skip
        self.page_size, self.max_running, self.max_batched_tokens = page_size, max_running, max_batched_tokens
        self.max_total_tokens = min(max_model_len, num_pages * page_size)
        self.policy = policy
        self.ledger = PageLedger(num_pages, page_size, max_running, cache)
        self.requests: dict[str, Request] = {}  # not finished
        self.waiting: list[Request] = []  # sorted by _order
        self.running: list[Request] = []  # sorted by _order: the last one is preempted first
        self._decoding: tuple[list[Request], np.ndarray] = [], np.empty(0, np.int64)  # `running` last, and its rows
        # by row: the position where a decode is to be looked at, and the last where only for a page
        self._until, self._last = np.zeros((2, max_running), np.int32)
        self._stop_ids: set[int] = set()  # of all requests so far
        self.step = self.num_arrived = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.preemptions = 0

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request and sets its `max_total`.

        Raises:
            RequestError: an id in use, an empty prompt, or one that can never fit.
        """
        limit = self.max_total_tokens
        if request.id in self.requests:
            raise RequestError(f"a request with id {request.id!r} is running already")
        if request.num_prompt == 0:
            raise RequestError("the prompt is empty; at least one token is needed", "prompt")
        if request.num_prompt >= limit:
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens; prompt and answer together may have {limit}", "prompt"
            )
        wanted = request.params.max_tokens
        if request.params.prompt_logprobs and wanted == 0:
            wanted = 1  # a step that samples, though nobody wants the token
        request.max_total = limit if wanted is None else min(limit, request.num_prompt + wanted)
        request.arrival = self.num_arrived
        self.num_arrived += 1
        self.requests[request.id] = request
        self._stop_ids |= request.stop_ids
        insort(self.waiting, request, key=_order)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, in whatever state it is; tokens still in flight will be dropped."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self.ledger.release(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self.requests[request.id]

    # -- a step --------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """Chooses the next step's tokens. The batch may be empty: nothing to do, or a step must be collected first."""
        batch = ScheduledBatch(self.step)
        behind = self._schedule_decodes(batch)
        batch.num_decodes = len(batch.requests)
        budget = self.max_batched_tokens - batch.num_decodes
        chunks: list[tuple[Request, int]] = []
        for request in behind:
            if budget and request.status is RequestStatus.RUNNING:
                budget = self._chunk(chunks, request, budget)
        if budget and self.waiting and not batch.stalled and not batch.preempted:
            self._admit(batch, chunks, budget)
        if chunks:
            batch.requests = batch.requests.copy()
        for request, count in sorted(chunks, key=lambda chunk: chunk[1] > 1):  # single tokens join the decodes
            self._append(batch, request, count)
            batch.num_decodes += count == 1
        if batch.requests:
            self.step += 1
        for request, _ in chunks:
            self.ledger.cache_prefix(request)
        return batch

    def _lacking(self, request: Request) -> int:
        """Tokens of a running request, known or in flight, that aren't computed; the next one always is to come."""
        return max(len(request.tokens) - int(self.ledger.computed[request.row]), 1)

    def _schedule_decodes(self, batch: ScheduledBatch) -> list[Request]:
        """One token for every request that wants just one; those that want more are returned.

        Only requests of which something must be decided are looked at: at batch 256 their objects, out of the caches
        since the last step, would be most of its time.
        """
        if self._decoding[0] != self.running:
            self._decoding = self.running.copy(), np.array([r.row for r in self.running], np.int64)
        (requests, rows), ledger = self._decoding, self.ledger
        starts = ledger.computed[rows]
        behind: list[Request] = []
        batch.requests, out = requests, []
        events = np.flatnonzero(starts >= self._until[rows])
        if len(events):
            left = self._extend(batch, events, rows[events], starts[events])
            out = [i for i in left if not self._decide(requests[i], i, batch, behind)]
        if out or batch.preempted:
            decodes = np.array([r.status is RequestStatus.RUNNING for r in requests])
            decodes[out] = False
            kept = np.flatnonzero(decodes)
            batch.grown = [(int(np.searchsorted(kept, i)), page) for i, page in batch.grown if decodes[i]]
            batch.requests, rows, starts = [requests[i] for i in kept], rows[kept], starts[kept]
        ledger.computed[rows] = starts + 1
        ledger.last_step[rows] = self.step
        batch.starts, batch.counts, batch.samples = starts.tolist(), [1] * len(rows), [True] * len(rows)
        return behind

    def _extend(self, batch: ScheduledBatch, places: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> list[int]:
        """Gives a page to each of the requests that need just that, if all can have one; the places of the others."""
        simple = starts < self._last[rows]
        if np.count_nonzero(simple) <= len(self.ledger.free):
            self._until[rows[simple]] = np.minimum(starts + self.page_size, self._last[rows])[simple]
            batch.grown = [(i, self.ledger.free.pop()) for i in places[simple].tolist()]
            for i, page in batch.grown:
                batch.requests[i].pages.append(page)
            places = places[~simple]
        return [int(i) for i in places]

    def _decide(self, request: Request, place: int, batch: ScheduledBatch, behind: list[Request]) -> bool:
        """Whether a request, the running ones' `place`th, decodes in this step. It gets a page if it needs one."""
        start = int(self.ledger.computed[request.row])
        if request.status is not RequestStatus.RUNNING or start + 1 >= request.max_total:
            return False  # preempted for one before it, or all its tokens are in flight
        if self._lacking(request) > 1:
            behind.append(request)
            return False
        if start >= len(request.pages) * self.page_size:
            if not self._grow(request, batch):
                return False
            batch.grown.append((place, request.pages[-1]))
        if start + 2 == request.max_total:
            batch.ending.append(request)
        self._last[request.row] = request.max_total - 2
        self._until[request.row] = min(len(request.pages) * self.page_size, request.max_total - 2)
        return True

    def _append(self, batch: ScheduledBatch, request: Request, count: int) -> None:
        start = int(self.ledger.computed[request.row])
        end, total = start + count, start + self._lacking(request)
        batch.requests.append(request)
        batch.starts.append(start)
        batch.counts.append(count)
        batch.samples.append(end == total)
        if end == total and end + 1 == request.max_total:
            batch.ending.append(request)
        self.ledger.computed[request.row] = end
        self.ledger.last_step[request.row] = self.step

    def _chunk(self, chunks: list[tuple[Request, int]], request: Request, budget: int) -> int:
        count = min(budget, self._lacking(request))
        chunks.append((request, count))
        return budget - count

    def _grow(self, request: Request, batch: ScheduledBatch) -> bool:
        """One more page for a request that decodes, by preemption if need be. False: not in this step."""
        while not self.ledger.take(request, 1):
            victim = self.running[-1]
            if self.ledger.deferred or victim is self.running[0]:
                batch.stalled.append(request)  # pages come when a step is collected
                return False
            self._preempt(victim, batch)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, batch: ScheduledBatch) -> None:
        computed = int(self.ledger.computed[request.row])
        assert self.ledger.last_step[request.row] < self.step, "a request that this step computes can't be preempted"
        self.running.remove(request)
        self.ledger.release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_total = max(len(request.tokens), computed + 1)
        request.num_preemptions += 1
        self.preemptions += 1
        insort(self.waiting, request, key=_order)
        batch.preempted.append(request)

    # -- admission -----------------------------------------------------------------------------------------------

    def _admit(self, batch: ScheduledBatch, chunks: list[tuple[Request, int]], budget: int) -> None:
        num_blocked = 0
        for request in self._candidates():
            if budget == 0 or len(self.running) >= self.max_running or not self.ledger.free_rows:
                break
            if request.num_total > len(request.tokens):
                continue  # its last token is still in flight
            if self._try_admit(request):
                batch.admitted.append(request)
                budget = self._chunk(chunks, request, budget)
                if self.waiting and _order(self.waiting[0]) < _order(request):
                    self.waiting[0].num_bypassed += 1
            else:
                num_blocked += 1
                if num_blocked > LOOK_AHEAD or self.waiting[0].num_bypassed >= MAX_BYPASS:
                    break

    def _candidates(self) -> list[Request]:
        """The waiting requests in the order in which to try them."""
        waiting = self.waiting
        cache = self.ledger.cache
        if self.policy != "lpm" or cache is None or waiting[0].num_bypassed >= MAX_BYPASS:
            return list(waiting)
        window = [r for r in waiting[:LPM_WINDOW] if r.priority == waiting[0].priority]
        ranked = sorted(window, key=lambda r: -cache.match_length(np.frombuffer(r.tokens, np.int32)))
        return ranked + waiting[len(window) :]

    def _try_admit(self, request: Request) -> bool:
        """Gives the request its pages and a row if, after that, every running request could still grow by a page."""
        watermark = len(self.running)
        if not self.ledger.admit(request, watermark):
            return False
        self.waiting.remove(request)
        insort(self.running, request, key=_order)
        self._until[request.row] = self._last[request.row] = 0
        if request.status is RequestStatus.WAITING:
            request.num_cached = int(self.ledger.computed[request.row])
            self.prompt_tokens += request.num_prompt
            self.cached_tokens += request.num_cached
        request.status = RequestStatus.RUNNING
        request.num_bypassed = 0
        return True

    # -- results -------------------------------------------------------------------------------------------------

    def collect(self, batch: ScheduledBatch, tokens: list[int]) -> list[Request]:
        """Takes the sampled tokens of a batch, one for each request with `samples` set, in order.

        Returns:
            The requests that gained a token; those whose last it was have a `finish_reason`.
        """
        finished, gained = RequestStatus.FINISHED, []
        for request, token in zip(batch.sampled, tokens, strict=True):
            if request.status is not finished:
                request.tokens.append(token)
                gained.append(request)
        if not self._stop_ids.isdisjoint(tokens):
            for request in gained:
                if request.tokens[-1] in request.stop_ids:
                    self.finish(request, FinishReason.STOP)
        for request in batch.ending:
            if request.status is not finished:
                self.finish(request, FinishReason.LENGTH)
        self.output_tokens += len(gained)
        self.ledger.collected(batch.step)
        return gained

    def check_integrity(self) -> None:
        """Accounts for every page, row and request; AssertionError if one is lost or held twice."""
        self.ledger.check_integrity(self.running)
        assert {id(r) for r in self.requests.values()} == {id(r) for r in self.running + self.waiting}
        assert self.running == sorted(self.running, key=_order)
        assert self.waiting == sorted(self.waiting, key=_order)
        assert len(self.running) <= self.max_running
        assert all(not r.pages and r.row == -1 for r in self.waiting)
        for request in self.running:
            computed = self.ledger.computed[request.row]
            assert computed < request.max_total and len(request.tokens) <= request.max_total
            assert len(request.pages) * self.page_size >= computed
