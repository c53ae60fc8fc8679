"""From logits to tokens: penalties, filters, Gumbel-max, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from minisgl.engine import vocab_parallel
from minisgl.engine.state import RowParams
from minisgl.kernels import cpu
from minisgl.kernels.sample.filter import filter_logits
from minisgl.kernels.sample.noise import gumbel_noise
from minisgl.models.sharding import VocabRange
from minisgl.types import Request

_NEVER = float("-inf")


class Way(IntEnum):
    """How a step samples: the way of the row that needs most."""

    PLAIN = 0
    FILTERED = 1  # top-k, top-p, min-p
    EAGER = 2  # what the host has a part in: penalties, bias, log-probabilities


@dataclass(slots=True)
class SampledTokens:
    """Tokens of one step, on the device. Log-probabilities are there for the rows in `logprob_rows`."""

    tokens: Tensor  # [R] int64
    logprob_rows: list[int]
    logprobs: Tensor | None = None  # [L] float32, of the sampled tokens
    top_ids: Tensor | None = None  # [L, K] int64
    top_logprobs: Tensor | None = None  # [L, K] float32


class RowState:
    """What the sampler knows of one running request beyond its `RowParams`.

    `counts` (how often each id was output) and `seen` (in prompt or output) exist only where a penalty needs them;
    they live on the device, which learns a token before the host does. Ids are those of `vocab`'s rows; the tokens of
    other ranks are counted in one row beyond the last.
    """

    def __init__(self, request: Request, vocab: VocabRange, device: torch.device) -> None:
        p = request.params
        self.params, self.vocab = p, vocab
        self.filtered = not p.greedy and (bool(p.top_k) or (p.top_p or 1.0) < 1 or bool(p.min_p))
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        repetition = p.repetition_penalty not in (None, 1.0)
        penalised = bool(p.frequency_penalty or p.presence_penalty or repetition)
        self.edits_logits = penalised or bool(p.logit_bias) or p.min_tokens > 0
        eager = self.edits_logits or p.logprobs or (self.filtered and not vocab.whole)
        self.way = Way.EAGER if eager else Way.FILTERED if self.filtered else Way.PLAIN
        if not self.edits_logits:
            return
        own = range(vocab.start, vocab.start + vocab.rows)
        bias = {token - vocab.start: value for token, value in p.logit_bias.items() if token in own}
        stops = [token - vocab.start for token in p.stop_token_ids if token in own]
        self.bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self.stop_ids = torch.tensor(stops, dtype=torch.int64, device=device)
        if penalised:
            known = vocab.local(torch.tensor(request.tokens, dtype=torch.int64, device=device))
            size = vocab.rows if vocab.whole else vocab.rows + 1
            self.counts = torch.bincount(known[request.num_prompt :], minlength=size).float()
            self.seen = torch.bincount(known, minlength=size).bool() if repetition else None

    def edit(self, logits: Tensor, output_index: int) -> None:
        """Applies penalties, bias and min_tokens to `logits` [rows] float32, in place.

        Repetition penalty as in CTRL (Keskar et al., 2019): over prompt and output, dividing positive logits and
        multiplying negative ones. Frequency and presence penalties as OpenAI defines them, over the output.
        """
        p, rows = self.params, self.vocab.rows
        if self.seen is not None:
            penalty = p.repetition_penalty or 1.0
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self.seen[:rows], penalised, logits))
        if self.counts is not None:
            counts = self.counts[:rows]
            logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        if p.logit_bias:
            logits.index_add_(0, self.bias_ids, self.bias)
        if output_index < p.min_tokens:
            logits.index_fill_(0, self.stop_ids, _NEVER)

    def append(self, token: Tensor) -> None:
        """Counts a sampled token ([1] int64 on the device); the host needn't know it yet."""
        token = self.vocab.local(token)
        if self.counts is not None:
            self.counts.index_add_(0, token, self.counts.new_ones(1))
        if self.seen is not None:
            self.seen.index_fill_(0, token, True)


def gumbel_argmax(logits: Tensor, params: RowParams, output_index: Tensor, vocab: VocabRange) -> Tensor:
    """Tokens [R] int64 from logits [R, rows]: the most likely at temperature 0, else drawn from the softmax."""
    if vocab.whole:
        return _best(logits, params, output_index)
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return vocab_parallel.best_of_ranks(values, _best(logits, params, output_index, vocab.start, values), vocab)


def _best(
    logits: Tensor, params: RowParams, output_index: Tensor, first: int = 0, values: Tensor | None = None
) -> Tensor:
    """The ids, of those from `first` on, that `logits` speak for; `values` gets what each was chosen by."""
    if logits.is_cuda:
        from minisgl.kernels.sample.op import sample_tokens

        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        sample_tokens(logits, params.temperature, params.seed, output_index, out, first, values)
        return out
    if cpu.available() and logits.dtype == torch.float32:
        return cpu.sample_tokens(logits, params.temperature, params.seed, output_index, first, values)
    greedy = params.temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, params.temperature)[:, None]
    if not bool(greedy.all()):
        noise = gumbel_noise(params.seed, output_index.long(), logits.shape[-1], first)
        scaled = torch.where(greedy[:, None], scaled, scaled + noise)
    if values is not None:
        values.copy_(scaled.amax(-1))
    return first + scaled.argmax(-1)


def filter_rows(logits: Tensor, params: RowParams, vocab: VocabRange, most: int) -> Tensor:
    """What top-k, top-p and min-p leave of `logits`, which may be overwritten.

    Args:
        most: that top-k leaves of a row; 0 where it leaves all of some row.
    """
    limits = params.temperature, params.top_k, params.top_p, params.min_p
    if vocab.whole:
        filter_logits(logits, *limits)
        return logits
    values, ids = vocab_parallel.candidates(logits.float(), most, vocab)
    filter_logits(values, *limits)
    return vocab_parallel.own_part(values, ids, vocab)


def _draw(
    logits: Tensor, rows: Sequence[RowState], params: RowParams, output_index: Tensor, vocab: VocabRange
) -> Tensor:
    """Only rows that need a filter pay for it; on one GPU the kernel knows which."""
    filtered = [i for i, r in enumerate(rows) if r.filtered]
    if filtered:
        logits = logits.clone()
    if filtered and logits.is_cuda and vocab.whole:
        filter_rows(logits, params, vocab, 0)
    elif filtered:
        tops = [rows[i].params.top_k or 0 for i in filtered]
        part = filter_rows(logits[filtered], params.select(filtered), vocab, max(tops) if all(tops) else 0)
        logits[filtered] = part.to(logits.dtype)
    return gumbel_argmax(logits, params, output_index, vocab)


def _logprobs(logits: Tensor, rows: Sequence[RowState], out: SampledTokens, vocab: VocabRange) -> None:
    wanted = out.logprob_rows
    num_top = max(rows[i].params.top_logprobs for i in wanted)
    out.logprobs, values, ids = vocab_parallel.token_logprobs(logits[wanted], out.tokens[wanted], num_top, vocab)
    if num_top:
        out.top_logprobs, out.top_ids = values, ids


def sample(
    logits: Tensor,
    rows: Sequence[RowState],
    params: RowParams,
    output_index: Tensor,
    output_index_host: Sequence[int],
    vocab: VocabRange,
) -> SampledTokens:
    """One token a row, the same on every rank.

    Args:
        logits: [R, rows] of `vocab`, of any floating type. rows, params: of the R requests.
        output_index: [R] which output token of its request each row is; the same on the host.
    """
    raw = logits
    edited = [i for i, r in enumerate(rows) if r.edits_logits]
    if edited:
        logits = logits.to(torch.float32, copy=True)
        for i in edited:
            rows[i].edit(logits[i], output_index_host[i])
    tokens = _draw(logits, rows, params, output_index, vocab)
    for i in edited:
        rows[i].append(tokens[i : i + 1])
    out = SampledTokens(tokens, [i for i, r in enumerate(rows) if r.params.logprobs])
    if out.logprob_rows:
        _logprobs(raw, rows, out, vocab)
    return out
