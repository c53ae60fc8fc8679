"""CUDA graphs of steps that hold prompts: what an eager step costs the host would keep the GPU waiting.

A graph has room for a number of decodes, and for tokens of prompts: a step takes the smallest that it fits, and dummies
fill it up. There are too many to capture them all at start, so each is captured when it is used for the second time; in
the first it runs eagerly, which compiles its kernels. The largest is captured first, at start: others fit its memory.
A graph ends at the hidden states of every sequence's last token. Head and sampler come after it, as in an eager step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend
from minisgl.cache.pool import KVPool
from minisgl.engine.graphs import captured
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.engine.state import DeviceRows, alias, upload
from minisgl.engine.steps import StepInputs, StepShape, forward_batch, lay_out
from minisgl.models.decoder import CausalLM
from minisgl.timing import collector_off

log = logging.getLogger(__name__)

MOST_TOKENS = 8192  # of prompts: on an H100 the smallest models keep the GPU busy longer than the host from there on
MOST_PROMPTS = 64


def prompt_sizes(max_tokens: int, hidden_size: int) -> list[int]:
    """Tokens of prompts with a graph: up to 1024 by halves of a power of two, by quarters where padding costs time.

    Wide models end at fewer tokens: those keep the GPU busy as long, and graphs hold on to their activations.
    """
    most = min(MOST_TOKENS, max_tokens, max(256, 2**24 // hidden_size))
    parts = {2**k: 2 if k < 10 else 4 for k in range(5, 13)}
    sizes = {size for low, n in parts.items() for size in range(low, 2 * low, low // n)} - {48, 96}
    return sorted({s for s in sizes if s < most} | {most})


def decode_sizes(max_batch: int) -> list[int]:
    """Decodes beside prompts: padding costs a row of each product, which is little beside the weights."""
    return sorted({s for s in (0, 16, 64, 256) if s < max_batch} | {max_batch})


@dataclass(slots=True)
class PromptStep:
    """A step of `shape` over fixed memory."""

    shape: StepShape
    inputs: StepInputs
    graph: torch.cuda.CUDAGraph | None = None
    hidden: Tensor | None = None  # [S, hidden_size] that a replay leaves, until the next of any graph


class PromptGraphs:
    """Steps with room for each of `sizes` tokens of prompts (ascending), and for decodes up to `max_batch`.

    memory: the graphs' pool.
    """

    def __init__(
        self, model: CausalLM, pool: KVPool, attention: AttentionBackend, state: DeviceRows, sizes: list[int],
        max_batch: int, memory: Any,
    ) -> None:  # fmt: skip
        self.model, self.parts, self.memory = model, (state, pool, attention), memory
        self.width = state.page_table.shape[1] * pool.page_size
        self.sizes = [size for size in sizes if size <= MOST_PROMPTS * self.width]
        self.decodes = decode_sizes(max_batch)
        self.steps: dict[StepShape, PromptStep] = {}
        self.capturing = True
        self._start(state)

    @torch.inference_mode()
    def _start(self, state: DeviceRows) -> None:
        largest = self._shape(self.sizes[-1], self.decodes[-1])
        for _ in range(2):
            padding, _ = lay_out(ScheduledBatch(0), largest, state.dummy, self.width)
            self.launch(largest, upload(state.lengths.device, *padding))

    def _shape(self, tokens: int, decodes: int) -> StepShape:
        return StepShape(decodes + tokens, decodes, decodes + MOST_PROMPTS)

    def fitting(self, batch: ScheduledBatch) -> StepShape | None:
        """The smallest shape that has room for the batch and its padding, if any has."""
        n, tokens = batch.num_decodes, batch.num_tokens - batch.num_decodes
        if tokens > self.sizes[-1] or n > self.decodes[-1]:
            return None
        size, dummies = next((s, -(-(s - tokens) // self.width)) for s in self.sizes if s >= tokens)
        fits = len(batch.requests) - n + dummies <= MOST_PROMPTS
        return self._shape(size, next(d for d in self.decodes if d >= n)) if fits else None

    def launch(self, shape: StepShape, inputs: list[Tensor]) -> Tensor:
        """Starts a step with `inputs`, those of StepInputs; hidden states [S, hidden_size] as of `run`."""
        step = self.steps.get(shape)
        if step is None:
            step = self.steps[shape] = PromptStep(shape, StepInputs(*(x.clone() for x in inputs)))
            return self.run(step)
        torch._foreach_copy_(list(step.inputs), inputs)  # one launch
        if step.graph is None and self.capturing:
            self._capture(step)
        if step.graph is None or step.hidden is None:
            return self.run(step)
        step.graph.replay()
        return step.hidden

    def run(self, step: PromptStep) -> Tensor:
        """What a graph captures: to the final hidden states [S, hidden_size] of the sequences' last tokens."""
        last = step.inputs.starts[1:].long() - 1
        return self.model.hidden(forward_batch(step.inputs, step.shape.decodes, *self.parts, last, None))

    def _capture(self, step: PromptStep) -> None:
        """Where this fails, the step and those that have no graph yet stay eager."""
        try:
            with collector_off(), torch.cuda.stream(torch.cuda.current_stream()):  # which a failure may have changed
                step.graph, hidden = captured(lambda: self.run(step), self.memory)
        except RuntimeError as e:  # memory has run out, above all
            self.capturing = False
            log.warning("no more CUDA graphs of steps with prompts: %s", str(e).splitlines()[0])
        else:
            step.hidden = alias(hidden, hidden.device)
