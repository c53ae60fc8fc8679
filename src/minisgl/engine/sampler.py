"""From logits to tokens: penalties, filters, Gumbel-max, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.engine.noise import gumbel_noise
from minisgl.types import Request

_NEVER = float("-inf")


@dataclass(slots=True)
class SampledTokens:
    """Tokens of one step, on the device. Log-probabilities are there for the rows in `logprob_rows`."""

    tokens: Tensor  # [R] int64
    logprob_rows: list[int]
    logprobs: Tensor | None = None  # [L] float32, of the sampled tokens
    top_ids: Tensor | None = None  # [L, K] int64
    top_logprobs: Tensor | None = None  # [L, K] float32


class RowState:
    """What the sampler keeps for one running request, on the device.

    `counts` (how often each id was output) and `seen` (in prompt or output) exist only where a penalty needs them.
    """

    def __init__(self, request: Request, seed: int, vocab_size: int, device: torch.device) -> None:
        p = request.params
        self.request = request
        self.params = p
        self.seed = seed if p.seed is None else p.seed
        self.filtered = bool(p.top_k) or (p.top_p or 1.0) < 1 or bool(p.min_p)
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        self.bias_ids = torch.tensor(list(p.logit_bias), dtype=torch.int64, device=device)
        self.bias = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32, device=device)
        self.stop_ids = torch.tensor(p.stop_token_ids, dtype=torch.int64, device=device)
        repetition = p.repetition_penalty not in (None, 1.0)
        if p.frequency_penalty or p.presence_penalty or repetition:
            known = torch.tensor(request.tokens, dtype=torch.int64, device=device)
            self.counts = torch.bincount(known[request.num_prompt :], minlength=vocab_size).float()
        if repetition:
            self.seen = torch.bincount(known, minlength=vocab_size).bool()
        self.edits_logits = self.counts is not None or bool(p.logit_bias) or p.min_tokens > 0

    def edit(self, logits: Tensor, output_index: int) -> None:
        """Applies penalties, bias and min_tokens to `logits` [vocab] float32, in place.

        Repetition penalty as in CTRL (Keskar et al., 2019): over prompt and output, dividing positive logits and
        multiplying negative ones. Frequency and presence penalties as OpenAI defines them, over the output.
        """
        p = self.params
        if self.seen is not None:
            penalty = p.repetition_penalty or 1.0
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self.seen, penalised, logits))
        if self.counts is not None:
            logits -= p.frequency_penalty * self.counts + p.presence_penalty * (self.counts > 0)
        if p.logit_bias:
            logits[self.bias_ids] += self.bias
        if output_index < p.min_tokens:
            logits[self.stop_ids] = _NEVER

    def append(self, token: Tensor) -> None:
        """Counts a sampled token ([1] int64 on the device); the host needn't know it yet."""
        if self.counts is not None:
            self.counts.index_add_(0, token, self.counts.new_ones(1))
        if self.seen is not None:
            self.seen.index_fill_(0, token, True)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Masks what top-k, then top-p of what is left, then min-p exclude. The most likely token always stays.

    Args:
        logits: [R, V] float32, temperature applied. top_k: [R] int64, 0 for off. top_p, min_p: [R] float32.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    k = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    ordered = ordered.masked_fill(rank >= k, _NEVER)
    probs = ordered.softmax(-1)
    outside = (probs.cumsum(-1) - probs >= top_p[:, None]) & (top_p[:, None] < 1)
    outside |= probs < min_p[:, None] * probs[:, :1]
    outside[:, 0] = False
    return torch.empty_like(logits).scatter_(1, ids, ordered.masked_fill(outside, _NEVER))


def _column(values: Sequence[float | int | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _choose(logits: Tensor, rows: Sequence[RowState], output_index: Sequence[int]) -> Tensor:
    """Tokens [R] for rows none of which is greedy."""
    device = logits.device
    logits = logits / _column([r.params.temperature for r in rows], torch.float32, device)[:, None]
    filtered = [i for i, r in enumerate(rows) if r.filtered]
    if filtered:
        params = [rows[i].params for i in filtered]
        logits[filtered] = filter_logits(
            logits[filtered],
            _column([p.top_k for p in params], torch.int64, device),
            _column([p.top_p for p in params], torch.float32, device),
            _column([p.min_p for p in params], torch.float32, device),
        )
    seeds = _column([r.seed for r in rows], torch.int64, device)
    noise = gumbel_noise(seeds, _column(output_index, torch.int64, device), logits.shape[-1])
    return (logits + noise).argmax(-1)


def _logprobs(logits: Tensor, rows: Sequence[RowState], out: SampledTokens) -> None:
    wanted = out.logprob_rows
    logprobs = logits[wanted].log_softmax(-1)
    out.logprobs = logprobs.gather(1, out.tokens[wanted, None])[:, 0]
    num_top = max(rows[i].params.top_logprobs for i in wanted)
    if num_top:
        out.top_logprobs, out.top_ids = logprobs.topk(num_top, dim=-1)


def sample(logits: Tensor, rows: Sequence[RowState], output_index: Sequence[int]) -> SampledTokens:
    """One token a row.

    Args:
        logits: [R, V] float32. rows: the state of the R requests. output_index: which output token each row is.
    """
    raw = logits
    edited = [i for i, r in enumerate(rows) if r.edits_logits]
    if edited:
        logits = logits.clone()
        for i in edited:
            rows[i].edit(logits[i], output_index[i])
    tokens = logits.argmax(-1)
    random = [i for i, r in enumerate(rows) if not r.params.greedy]
    if random:
        chosen = logits if len(random) == len(rows) else logits[random]
        tokens[random] = _choose(chosen, [rows[i] for i in random], [output_index[i] for i in random])
    for i in edited:
        rows[i].append(tokens[i : i + 1])
    out = SampledTokens(tokens, [i for i, r in enumerate(rows) if r.params.logprobs])
    if out.logprob_rows:
        _logprobs(raw, rows, out)
    return out
