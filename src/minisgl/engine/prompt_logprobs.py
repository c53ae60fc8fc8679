"""Log-probabilities of prompts: what a model thinks of text that it is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisgl.engine.scheduler import ScheduledBatch
from minisgl.engine.vocab_parallel import token_logprobs
from minisgl.models.decoder import CausalLM
from minisgl.types import Request, TokenLogprob

CHUNK = 256  # rows whose logits exist at the same time


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows [N] int32 of a step's tokens that predict prompt tokens, and those tokens [N] int32."""

    request: Request
    start: int  # position of the first
    rows: np.ndarray
    targets: np.ndarray


def prompt_rows(batch: ScheduledBatch) -> list[PromptRows]:
    """What of a step predicts tokens of prompts whose log-probabilities are wanted."""
    found, row = [], 0
    for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
        if request.params.prompt_logprobs and not request.num_output:  # they were sent before a preemption
            targets = np.array(request.tokens[start + 1 : min(start + count, request.num_prompt - 1) + 1], np.int32)
            if targets.size:
                rows = np.arange(row, row + targets.size, dtype=np.int32)
                found.append(PromptRows(request, start, rows, targets))
        row += count
    return found


def read_prompts(
    prompts: list[PromptRows], hidden: Tensor, model: CausalLM, results: dict[str, list[TokenLogprob]]
) -> None:
    """Adds to `results`, by request id. Waits for the device: nobody scores prompts at a decode's pace.

    Args:
        hidden: [sum of the prompts' N, hidden_size].
    """
    for part, states in zip(prompts, hidden.split([p.rows.size for p in prompts]), strict=True):  # type: ignore[no-untyped-call]
        entries = [] if part.start == 0 else results[part.request.id]
        results[part.request.id] = entries
        num_top = part.request.params.top_logprobs
        for at in range(0, part.targets.size, CHUNK):
            targets = part.targets[at : at + CHUNK]
            tokens = torch.from_numpy(targets).long().to(hidden.device)
            found = token_logprobs(model.logits(states[at : at + CHUNK]), tokens, num_top, model.vocab)
            own, values, ids = (x.tolist() for x in found)
            for token, value, top_ids, top_values in zip(targets.tolist(), own, ids, values, strict=True):
                entries.append(TokenLogprob(token, value, tuple(zip(top_ids, top_values, strict=True))))
