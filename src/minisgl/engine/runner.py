"""Runs batches on the device in two phases: `launch` starts a step, `collect` waits for its tokens.

Between the two the engine may launch the next step: whatever that needs of the step before it, such as the token just
sampled, it reads from `DeviceRows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend
from minisgl.cache.pool import KVPool
from minisgl.engine.graphs import DecodeGraphs
from minisgl.engine.prompt_graphs import PromptGraphs
from minisgl.engine.prompt_logprobs import prompt_rows, read_prompts
from minisgl.engine.sampler import RowState, SampledTokens, Way, sample
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.engine.state import DeviceRows, RowParams, param_words, upload
from minisgl.engine.steps import StepInputs, StepShape, forward_batch, lay_out
from minisgl.models.decoder import CausalLM
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
    """Holds the model, the pool and the device's state of running requests."""

    def __init__(
        self, model: CausalLM, pool: KVPool, attention: AttentionBackend, num_rows: int, max_tokens: int, seed: int
    ) -> None:
        self.model = model
        self.pool = pool
        self.attention = attention
        self.seed = seed
        self.device = pool.k.device
        self.upload = partial(upload, self.device)
        self.rows = DeviceRows(num_rows, -(-max_tokens // pool.page_size), pool.dummy_page, self.device)
        self.states: dict[int, RowState] = {}  # by row
        self._unsampled: set[int] = set()  # rows whose next input isn't their `last_token`: prompts in chunks
        self._special: set[int] = set()  # rows that sample in another way than PLAIN, or did when they were last used
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None  # not used without `graphs`
        self.prompt_logprobs: dict[str, list[TokenLogprob]] = {}  # by request, to be taken with its first token

    def capture(self, sizes: list[int], prompts: Sequence[int] = (), progress: bool = True) -> None:
        """Captures CUDA graphs of decode steps with so many requests, and of steps with so many tokens of prompts."""
        parts, memory = (self.model, self.pool, self.attention, self.rows), torch.cuda.graph_pool_handle()
        if prompts:  # before the others, which fit the memory of the largest
            self.prompt_graphs = PromptGraphs(*parts, list(prompts), sizes[-1], memory)
        self.graphs = DecodeGraphs(*parts, sizes, progress, memory)

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Starts a step. On a CUDA device it returns before the step has run."""
        if batch.admitted:
            self._admit(batch.admitted)
        handle = StepHandle(batch, batch.sampled)
        if self.graphs is not None and self._is_plain_decode(batch):
            self._launch_graph(handle, self.graphs)
        else:
            self._launch_varied(handle)
        return handle

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step's tokens."""
        if handle.done is not None:
            handle.done.synchronize()
        if handle.tokens is None:
            return StepResult([], {})
        tokens = handle.tokens.tolist()
        return StepResult(tokens, _logprobs(handle, tokens) if handle.sampled else {})

    def _admit(self, requests: list[Request]) -> None:
        lines = []
        for request in requests:
            seed = request.params.seed if request.params.seed is not None else hash((self.seed, request.arrival))
            state = self.states[request.row] = RowState(request, self.model.vocab)
            (self._special.add if state.way else self._special.discard)(request.row)
            self.rows.admit(request)
            if state.penalised:
                self.rows.keep_tokens(request, self.rows.page_table.shape[1] * self.pool.page_size)
            self._unsampled.add(request.row)
            lines.append(param_words(request, seed))
        places = np.array([r.row for r in requests], np.int32)
        self.rows.write_params(*self.upload(places, np.stack(lines)))

    # -- with graphs ---------------------------------------------------------------------------------------------

    def _is_plain_decode(self, batch: ScheduledBatch) -> bool:
        """Whether every request decodes one token, and the device has the one before."""
        count = len(batch.requests)
        assert self.graphs is not None
        if batch.num_decodes != count or count > self.graphs.max_batch:
            return False
        return not self._unsampled or self._unsampled.isdisjoint(r.row for r in batch.requests)

    def _launch_graph(self, handle: StepHandle, graphs: DecodeGraphs) -> None:
        requests = handle.requests
        way = max(self.states[r.row].way for r in requests) if self._special else Way.PLAIN
        with span("forward"):
            done, tokens, event = graphs.replay(handle.batch, way)
        if way is not Way.EAGER:
            handle.tokens, handle.done = tokens, event
        else:
            count, step, x = len(requests), done.step, done.step.inputs
            with span("sample"):
                rows, params = step.words[0, :count], RowParams(x.params[:count])
                self._sample(handle, done.logits[:count], rows, params, x.output_index[:count])

    # -- steps of any mix ----------------------------------------------------------------------------------------

    def _launch_varied(self, handle: StepHandle) -> None:
        """Up to the hidden states by a graph, if one fits; from there on as eager steps do."""
        batch, graphs = handle.batch, self.prompt_graphs if self.graphs is not None else None
        with span("prepare"):
            prompts = prompt_rows(batch)
            shape = graphs.fitting(batch) if graphs is not None and not prompts else None
            room = shape or StepShape(batch.num_tokens, batch.num_decodes, len(batch.requests))
            width = self.rows.page_table.shape[1] * self.pool.page_size
            host, places = lay_out(batch, room, self.rows.dummy, width)
            sampling = places[np.array(batch.samples, bool)]
            last = (sampling if shape else host.starts[sampling + 1] - 1).astype(np.int32)
            wanted = np.concatenate([last, *(p.rows for p in prompts)])
            deltas = self.rows.page_deltas(batch.requests)
            *inputs, wanted_rows, rows, pages = self.upload(*host, wanted, host.rows[sampling], deltas)
            self.rows.write_pages(pages)
        with span("forward"):
            if shape is not None and graphs is not None:
                hidden = graphs.launch(shape, inputs).index_select(0, wanted_rows)
            else:
                parts = self.rows, self.pool, self.attention, wanted_rows, host
                hidden = self.model.hidden(forward_batch(StepInputs(*inputs), room.decodes, *parts))
            logits = self.model.logits(hidden[: len(handle.requests)]) if handle.requests else None
        if prompts:
            read_prompts(prompts, hidden[len(handle.requests) :], self.model, self.prompt_logprobs)
        if logits is not None:
            with span("sample"):
                params = RowParams(self.rows.params.index_select(0, rows))
                index = self.rows.lengths.index_select(0, rows) - params.num_prompt
                self._sample(handle, logits, rows, params, index)

    def _sample(self, handle: StepHandle, logits: Tensor, rows: Tensor, params: RowParams, index: Tensor) -> None:
        states = [self.states[r.row] for r in handle.requests]
        index_host = [i for i, s in zip(handle.batch.output_index, handle.batch.samples, strict=True) if s]
        ends = zip(handle.requests, index_host, states, strict=True)
        length = max((r.num_prompt + i for r, i, s in ends if s.penalised), default=0)
        past = self.rows.past(rows, length) if length else None
        sampled = sample(logits, states, params, index, index_host, self.model.vocab, past)
        if past is not None:
            self.rows.append(rows, params.num_prompt + index, sampled.tokens)
        self.rows.last_token.index_copy_(0, rows.long(), sampled.tokens.to(torch.int32))
        self._unsampled.difference_update(r.row for r in handle.requests)
        if sampled.logprob_rows:
            handle.sampled = sampled
        self._fetch(handle, sampled.tokens)

    def _fetch(self, handle: StepHandle, tokens: Tensor) -> None:
        """Starts the copy of the step's tokens to the host."""
        if self.device.type == "cpu":
            handle.tokens = tokens
            return
        handle.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        handle.tokens.copy_(tokens, non_blocking=True)
        handle.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        handle.done.record()


def _logprobs(handle: StepHandle, tokens: list[int]) -> dict[int, TokenLogprob]:
    sampled = handle.sampled
    assert sampled is not None and sampled.logprobs is not None
    own = sampled.logprobs.tolist()
    top_ids = sampled.top_ids.tolist() if sampled.top_ids is not None else [[]] * len(own)
    top_values = sampled.top_logprobs.tolist() if sampled.top_logprobs is not None else [[]] * len(own)
    result = {}
    for i, row in enumerate(sampled.logprob_rows):
        count = handle.requests[row].params.top_logprobs
        top = tuple(zip(top_ids[i][:count], top_values[i][:count], strict=True))
        result[row] = TokenLogprob(tokens[row], own[i], top)
    return result
