"""Runs batches on the device in two phases: `launch` starts a step, `collect` waits for its tokens.

Between the two the engine may launch the next step. Its input for a request whose token is still in flight is read
from `last_token`, which the sampler of the step before writes on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.engine.sampler import RowState, SampledTokens, sample
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.models import CausalLM
from minisgl.timing import span
from minisgl.types import Request, TokenLogprob


@dataclass(slots=True)
class StepHandle:
    """A step in flight: what was asked, and where its results will be."""

    batch: ScheduledBatch
    requests: list[Request]  # that sample, in order
    sampled: SampledTokens | None = None
    tokens: Tensor | None = None  # [R] on the host, valid after `done`
    done: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens of the requests that sampled, in the batch's order, and log-probabilities of those that want them."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprob]  # by place in `tokens`


class ModelRunner:
    """Holds the model, the pool and the device-resident state of running requests, by row."""

    def __init__(self, model: CausalLM, pool: KVPool, attention: AttentionBackend, num_rows: int, seed: int) -> None:
        self.model = model
        self.pool = pool
        self.attention = attention
        self.seed = seed
        self.device = pool.k.device
        self.last_token = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        self.rows: list[RowState | None] = [None] * num_rows

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Starts a step. On a CUDA device it returns before the step has run."""
        vocab = self.model.config.vocab_size
        for request in batch.admitted:
            seed = hash((self.seed, request.arrival))
            self.rows[request.row] = RowState(request, seed, vocab, self.device)
        sampling = [i for i, s in enumerate(batch.samples) if s]
        handle = StepHandle(batch, [batch.requests[i] for i in sampling])
        with span("prepare"):
            forward = self._forward_batch(batch)
        with span("forward"):
            logits = self.model.forward(forward)
        if sampling:
            with span("sample"):
                self._sample(handle, logits, [batch.output_index[i] for i in sampling])
        return handle

    def _sample(self, handle: StepHandle, logits: Tensor, output_index: list[int]) -> None:
        rows = [r.row for r in handle.requests]
        states = [state for row in rows if (state := self.rows[row]) is not None]
        handle.sampled = sample(logits, states, output_index)
        tokens = handle.sampled.tokens
        self.last_token[torch.tensor(rows, device=self.device)] = tokens.to(torch.int32)
        handle.tokens = tokens.to("cpu", non_blocking=True)
        if self.device.type == "cuda":
            handle.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            handle.done.record()

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step's tokens."""
        if handle.done is not None:
            handle.done.synchronize()
        sampled = handle.sampled
        if sampled is None or handle.tokens is None:
            return StepResult([], {})
        return StepResult(handle.tokens.tolist(), _logprobs(handle, sampled))

    # -- inputs --------------------------------------------------------------------------------------------------

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _forward_batch(self, batch: ScheduledBatch) -> ForwardBatch:
        starts, counts = np.array(batch.starts, np.int32), np.array(batch.counts, np.int32)
        query_starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        page_table = _page_table(batch.requests, starts + counts, self.pool.page_size)
        owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        positions = np.arange(query_starts[-1], dtype=np.int32) - np.repeat(query_starts[:-1] - starts, counts)
        size = self.pool.page_size
        slots = page_table[owner, positions // size].astype(np.int64) * size + positions % size
        logits_indices = query_starts[1:][np.array(batch.samples, bool)].astype(np.int64) - 1
        forward = ForwardBatch(
            input_ids=self._input_ids(batch, query_starts),
            positions=self._upload(positions),
            slots=self._upload(slots),
            page_table=self._upload(page_table),
            seq_lens=self._upload(starts + counts),
            query_starts=self._upload(query_starts),
            logits_indices=self._upload(logits_indices),
            num_decodes=batch.num_decodes,
            seq_lens_host=starts + counts,
            query_lens_host=counts,
            pool=self.pool,
            attention=self.attention,
        )
        self.attention.prepare(forward)
        return forward

    def _input_ids(self, batch: ScheduledBatch, query_starts: np.ndarray) -> Tensor:
        """Ids from the host where it knows them; from `last_token` for a decode whose input is in flight."""
        ids = np.zeros(query_starts[-1], np.int32)
        in_flight: list[int] = []
        for i, (request, start, count) in enumerate(zip(batch.requests, batch.starts, batch.counts, strict=True)):
            at = int(query_starts[i])
            if start < len(request.tokens):
                ids[at : at + count] = request.tokens[start : start + count]
            else:
                in_flight.append(i)
        input_ids = self._upload(ids)
        if in_flight:
            rows = torch.tensor([batch.requests[i].row for i in in_flight], device=self.device)
            at_device = torch.tensor(query_starts[in_flight].tolist(), device=self.device)
            input_ids[at_device] = self.last_token[rows]
        return input_ids


def _page_table(requests: list[Request], lens: np.ndarray, page_size: int) -> np.ndarray:
    """[S, P] int32, P the pages of the longest sequence; short rows are padded with page 0."""
    needed = -(-lens // page_size)
    table = np.zeros((len(requests), int(needed.max(initial=1))), np.int32)
    for row, request, count in zip(table, requests, needed.tolist(), strict=True):
        row[:count] = request.pages[:count]
    return table


def _logprobs(handle: StepHandle, sampled: SampledTokens) -> dict[int, TokenLogprob]:
    if sampled.logprobs is None:
        return {}
    own = sampled.logprobs.tolist()
    top_ids = sampled.top_ids.tolist() if sampled.top_ids is not None else [[]] * len(own)
    top_values = sampled.top_logprobs.tolist() if sampled.top_logprobs is not None else [[]] * len(own)
    tokens = sampled.tokens.tolist()
    result = {}
    for i, row in enumerate(sampled.logprob_rows):
        count = handle.requests[row].params.top_logprobs
        top = tuple(zip(top_ids[i][:count], top_values[i][:count], strict=True))
        result[row] = TokenLogprob(tokens[row], own[i], top)
    return result
