"""CUDA graphs of decode steps: a step costs the host one launch, or two.

There is a graph for each batch size of a ladder; a smaller batch is padded with the dummy row. A graph takes its
inputs from `DeviceRows`: the host sends the rows of the batch and the pages that they gained. The page table's width
counts as an input's shape: attention has less to do where it has no room for long contexts. A graph goes from there
to tokens, for rows that need nothing but a temperature; where some row needs filters, a second graph samples again from
the same logits, and for penalties and log-probabilities eager kernels do. All share one memory pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.engine.sampler import Way, filter_rows, gumbel_argmax
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.engine.state import DeviceRows, Mailbox, RowParams, alias
from minisgl.kernels.prepare.op import NEVER, DecodeInputs, prepare
from minisgl.models.decoder import CausalLM
from minisgl.timing import collector_off

T = TypeVar("T")


def batch_sizes(max_batch: int) -> list[int]:
    """Batch sizes with a graph: every one up to 4, then steps of at most an eighth or so."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, *range(24, 129, 8), *range(144, 257, 16), *range(288, 1025, 32)]
    return sorted({s for s in sizes if s < max_batch} | {max_batch})


class DecodeStep:
    """The work of one decode step over fixed memory, for `size` requests: what a graph captures.

    mail: brings the only input, see `kernels.prepare`, and takes the tokens. pages: how many a request has at most.
    """

    def __init__(
        self, model: CausalLM, pool: KVPool, attention: AttentionBackend, state: DeviceRows, mail: Mailbox, size: int,
        pages: int,
    ) -> None:  # fmt: skip
        self.model, self.pool, self.attention, self.state, self.mail = model, pool, attention, state, mail
        self.size, device = size, pool.k.device
        self.words = torch.zeros(3, size, dtype=torch.int32, device=device)
        self.table = state.page_table[:, :pages]
        self.inputs = DecodeInputs.empty(self.size, device)
        self.tokens = torch.zeros(self.size, dtype=torch.int64, device=device)
        self._starts = torch.arange(self.size + 1, dtype=torch.int32, device=device)

    def forward(self) -> Tensor:
        """Reads the rows' state, runs the model, counts the token computed. Returns logits [size, V]."""
        x, nothing = self.inputs, np.empty(0, np.int32)
        self.mail.receive(self.words)
        prepare(self.words, self.state.tables, self.pool.page_size, x)
        batch = ForwardBatch(
            x.ids, x.positions, x.slots, self.table, x.lens, self._starts, None, self.size, nothing, nothing,
            self.pool, self.attention, table_rows=self.words[0],
        )  # fmt: skip
        self.attention.prepare(batch)
        return self.model.forward(batch)

    def run(self) -> Tensor:
        """The whole step for rows whose way is PLAIN. Returns the logits, for rows that need more."""
        logits = self.forward()
        self.sample(logits, False)
        return logits

    def sample(self, logits: Tensor, filtered: bool) -> None:
        """Samples `tokens` for rows whose way is PLAIN, or FILTERED (`logits` may be overwritten then).

        Nothing of it comes from the host; `last_token` of the rows is written as well.
        """
        x, vocab, last = self.inputs, self.model.vocab, self.state.last_token
        params = RowParams(x.params)
        if filtered:
            filter_rows(logits, params, vocab, 0)
        if logits.is_cuda and vocab.whole:
            from minisgl.kernels.sample.op import sample_tokens

            choice = params.temperature, params.seed, x.output_index
            sample_tokens(logits, *choice, self.tokens, rows=self.words[0], last=last)
        else:
            self.tokens.copy_(gumbel_argmax(logits, params, x.output_index, vocab))
            last.index_copy_(0, self.words[0].long(), self.tokens.to(torch.int32))
        self.mail.send(self.tokens)


@dataclass(frozen=True, slots=True)
class Captured:
    """A step as graphs. What a replay leaves in `logits` and in the step's tensors is valid until the next one."""

    step: DecodeStep
    plain: torch.cuda.CUDAGraph  # forward, and tokens of rows whose way is PLAIN
    filtered: torch.cuda.CUDAGraph | None  # other tokens from its logits; None: such rows are sampled eagerly
    logits: Tensor


class DecodeGraphs:
    """Captured decode steps for batches of `sizes` (ascending, see `batch_sizes`): for short contexts, and for any."""

    def __init__(
        self, model: CausalLM, pool: KVPool, attention: AttentionBackend, state: DeviceRows, sizes: list[int],
        progress: bool, memory: Any = None,
    ) -> None:  # fmt: skip
        self.sizes, self.max_batch, self.state = sizes, sizes[-1], state
        self.filters = model.vocab.whole
        self.mail = Mailbox(self.max_batch, np.array([[state.dummy], [NEVER], [0]], np.int32), pool.k.device)
        self.page_size, most = pool.page_size, state.page_table.shape[1]
        self.widths = sorted({min((attention.short_context or most * self.page_size) // self.page_size, most), most})
        self._steps: dict[tuple[int, int], Captured] = {}
        wanted = [(size, pages) for size in reversed(self.sizes) for pages in self.widths]
        with collector_off():
            for size, pages in _progress(wanted, progress):  # the largest first: others fit its memory
                step = DecodeStep(model, pool, attention, state, self.mail, size, pages)
                self._steps[size, pages], memory = self._capture(step, memory)
        self.mail.reset()

    @torch.inference_mode()
    def _capture(self, step: DecodeStep, memory: Any) -> tuple[Captured, Any]:
        """The step's graphs, in the pool `memory` (None: a new one), which is returned for the next."""
        self.mail.reset(step.size)
        logits = step.run()  # kernels are compiled, libraries make their handles
        if self.filters:
            step.sample(logits, True)
        del logits
        plain, logits = captured(step.run, memory)
        filtered = captured(lambda: step.sample(logits, True), plain.pool())[0] if self.filters else None
        return Captured(step, plain, filtered, alias(logits, logits.device)), plain.pool()

    def replay(self, batch: ScheduledBatch, way: Way) -> tuple[Captured, Tensor, torch.cuda.Event | None]:
        """Starts a step for requests that decode.

        Returns:
            Beside the step, where on the host its tokens [R] int64 will be, and the event after which they are there.
            They are those of `way`, or where that is EAGER, of no use.
        """
        count = len(batch.requests)
        size = next(s for s in self.sizes if s >= count)
        pages = next(w for w in self.widths if w * self.page_size > max(batch.starts))
        found = self._steps[size, pages]
        self.state.decode_words(batch.requests, batch.grown, self.mail.next_words(size))
        found.step.attention.before_replay(size, pages, batch.starts)
        found.plain.replay()
        if way is Way.FILTERED and found.filtered is not None:
            found.filtered.replay()
        return found, *self.mail.tokens(count)


def captured(work: Callable[[], T], memory: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `work` in the pool `memory`, and what `work` returned. What other threads do meanwhile can't harm."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def _progress(work: list[tuple[int, int]], show: bool) -> Iterable[tuple[int, int]]:
    if not show:
        return work
    from rich.console import Console
    from rich.progress import track

    return track(work, "Capturing CUDA graphs", console=Console(stderr=True))
