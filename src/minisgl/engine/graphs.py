"""CUDA graphs of decode steps: a step costs the host one small copy and one or two launches.

There is a graph for each batch size of a ladder; a smaller batch is padded with the dummy row. A graph takes its
inputs from `DeviceRows`: the host sends the rows of the batch and the pages that they gained. Forward graphs end at
logits, in one memory pool; a sampler graph behind each serves rows that need no filter, penalty or log-probability.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.engine.sampler import gumbel_argmax
from minisgl.engine.state import DeviceRows, RowParams, Uploader
from minisgl.models import CausalLM
from minisgl.types import Request

WARM_UPS = 2  # runs before a capture: kernels are compiled, libraries make their handles


def ladder(max_batch: int) -> list[int]:
    """Batch sizes with a graph: every one up to 4, then steps of at most an eighth or so."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, *range(24, 129, 8), *range(144, 257, 16), *range(288, 1025, 32)]
    return sorted({s for s in sizes if s < max_batch} | {max_batch})


class DecodeStep:
    """The work of one decode step over fixed memory, for `size` requests: what a graph captures.

    words: [4, size] int32, the only input: rows; then row, place and page of pages gained.
    """

    def __init__(
        self, model: CausalLM, pool: KVPool, attention: AttentionBackend, state: DeviceRows, words: Tensor
    ) -> None:
        self.model, self.pool, self.attention, self.state = model, pool, attention, state
        self.words = words
        self.size = words.shape[1]
        self.rows = torch.zeros(self.size, dtype=torch.int64, device=words.device)
        self.params = torch.zeros(self.size, 8, dtype=torch.int32, device=words.device)
        self.output_index = torch.zeros(self.size, dtype=torch.int32, device=words.device)
        self.tokens = torch.zeros(self.size, dtype=torch.int64, device=words.device)
        self._starts = torch.arange(self.size + 1, dtype=torch.int32, device=words.device)

    def forward(self) -> Tensor:
        """Reads the rows' state, runs the model, counts the token computed. Returns logits [size, V]."""
        state, size = self.state, self.pool.page_size
        state.write_pages(self.words[1:])
        self.rows.copy_(self.words[0])
        positions = state.lengths.index_select(0, self.rows)
        lens = positions + 1
        table = state.page_table.index_select(0, self.rows)
        page = table.gather(1, (positions // size).long()[:, None])[:, 0]
        ids = state.last_token.index_select(0, self.rows)
        slots = page.long() * size + positions % size
        nothing = np.empty(0, np.int32)
        batch = ForwardBatch(
            ids, positions, slots, table, lens, self._starts, self._starts[:-1].long(), self.size, nothing, nothing,
            self.pool, self.attention,
        )  # fmt: skip
        self.attention.prepare(batch)
        logits = self.model.forward(batch)
        state.lengths.index_copy_(0, self.rows, torch.where(self.rows == state.dummy, 0, lens))
        self.params.copy_(state.params.index_select(0, self.rows))
        self.output_index.copy_(lens - self.params[:, 6])
        return logits

    def sample(self, logits: Tensor) -> None:
        """Samples `tokens`, and makes them the rows' last ones."""
        self.tokens.copy_(gumbel_argmax(logits, RowParams(self.params), self.output_index))
        self.state.last_token.index_copy_(0, self.rows, self.tokens.to(torch.int32))


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replayed step leaves; valid until the next one."""

    logits: Tensor  # [R, V]
    rows: Tensor  # [R]
    params: Tensor  # [R, 8]
    output_index: Tensor  # [R]
    tokens: Tensor  # [R] int64, if it sampled


@dataclass(frozen=True, slots=True)
class _Captured:
    step: DecodeStep
    forward: torch.cuda.CUDAGraph
    sampler: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Captured decode steps for batches of up to `max_batch`."""

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        attention: AttentionBackend,
        state: DeviceRows,
        max_batch: int,
        progress: bool,
    ) -> None:
        self.max_batch, self.state = max_batch, state
        self.sizes = ladder(max_batch)
        self._pad = np.array([[state.dummy], [state.dummy], [0], [pool.dummy_page]], np.int32)
        self._steps: dict[int, _Captured] = {}
        memory = None
        for size in _progress(sorted(self.sizes, reverse=True), progress):  # the largest first: others fit its memory
            words = torch.from_numpy(np.repeat(self._pad, size, axis=1)).to(pool.k.device)
            self._steps[size], memory = self._capture(DecodeStep(model, pool, attention, state, words), memory)

    @torch.inference_mode()
    def _capture(self, step: DecodeStep, memory: Any) -> tuple[_Captured, Any]:
        """The step's graphs, in the pool `memory` (None: a new one), which is returned for the next."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step.sample(step.forward())
        torch.cuda.current_stream().wait_stream(stream)
        forward, sampler = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=memory):
            logits = step.forward()
        with torch.cuda.graph(sampler, pool=forward.pool()):
            step.sample(logits)
        return _Captured(step, forward, sampler, _alias(logits)), forward.pool()

    def replay(self, upload: Uploader, requests: Sequence[Request], deltas: np.ndarray, sample: bool) -> Replay:
        """Starts a step for `requests`, each of which gained one page at most (`deltas`, see `page_deltas`)."""
        count = len(requests)
        size = next(s for s in self.sizes if s >= count)
        captured = self._steps[size]
        step, logits = captured.step, captured.logits
        words = np.repeat(self._pad, size, axis=1)
        words[0, :count] = [r.row for r in requests]
        words[1:, : deltas.shape[1]] = deltas
        upload.send(words.ravel(), out=step.words.view(-1))
        captured.forward.replay()
        if sample:
            captured.sampler.replay()
        return Replay(
            logits[:count], step.rows[:count], step.params[:count], step.output_index[:count], step.tokens[:count]
        )


def _progress(sizes: list[int], show: bool) -> Iterable[int]:
    if not show:
        return sizes
    from rich.console import Console
    from rich.progress import track

    return track(sizes, "Capturing CUDA graphs", console=Console(stderr=True))


def _alias(x: Tensor) -> Tensor:
    """The memory of `x` without holding it: the next capture may use it for what is dead before this is read."""
    words = {1: "|u1", 2: "<u2", 4: "<u4"}[x.element_size()]

    class View:
        __cuda_array_interface__ = {
            "data": (x.data_ptr(), False), "shape": tuple(x.shape), "typestr": words, "version": 3,
            "strides": tuple(s * x.element_size() for s in x.stride()),
        }  # fmt: skip

    return torch.as_tensor(View(), device=x.device).view(x.dtype)
