"""From logits to tokens: penalties, filters, Gumbel-max, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from minisgl.engine import vocab_parallel
from minisgl.engine.state import Past, RowParams, upload
from minisgl.kernels import cpu
from minisgl.kernels.sample.filter import filter_logits
from minisgl.kernels.sample.noise import gumbel_noise
from minisgl.models.sharding import VocabRange
from minisgl.types import Request

_NEVER = float("-inf")
_BESIDE = 16  # columns beside the logits, for tokens that aren't this rank's; keeps rows aligned


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
    """How one running request samples, beyond its `RowParams`.

    `changes` are what is added to its logits: places among `vocab`'s rows (int32) and values (float32); `early` the
    same while there are fewer than `min_tokens` output tokens.
    """

    def __init__(self, request: Request, vocab: VocabRange) -> None:
        p = self.params = request.params
        self.filtered = not p.greedy and (bool(p.top_k) or (p.top_p or 1.0) < 1 or bool(p.min_p))
        self.penalised = bool(p.frequency_penalty or p.presence_penalty or p.repetition_penalty not in (None, 1.0))
        self.edits_logits = self.penalised or bool(p.logit_bias) or p.min_tokens > 0
        eager = self.edits_logits or p.logprobs or (self.filtered and not vocab.whole)
        self.way = Way.EAGER if eager else Way.FILTERED if self.filtered else Way.PLAIN
        self.changes = _changes(p.logit_bias, vocab)
        self.early = _changes(p.logit_bias | dict.fromkeys(p.stop_token_ids, _NEVER), vocab)


def _changes(wanted: dict[int, float], vocab: VocabRange) -> tuple[np.ndarray, np.ndarray]:
    own = {token - vocab.start: value for token, value in wanted.items() if 0 <= token - vocab.start < vocab.rows}
    return np.array(list(own), np.int32), np.array(list(own.values()), np.float32)


def penalise(logits: Tensor, past: Past, params: RowParams, output_index: Tensor, vocab: VocabRange) -> None:
    """Changes `logits` [R, more than rows of `vocab`] float32 in place; what lies beyond those rows is used up.

    Repetition penalty as in CTRL (Keskar et al., 2019): over prompt and output, dividing positive logits and
    multiplying negative ones. Frequency and presence penalties as OpenAI defines them, over the output. Only logits of
    tokens that a request has had are touched; a token that it had twice is written twice, with one value.
    """
    place = torch.arange(past.tokens.shape[1], device=logits.device)
    first = params.num_prompt[:, None]
    had = place < first + output_index[:, None]
    ids = torch.where(had, vocab.local(past.tokens.long()), vocab.rows)
    counts = torch.zeros_like(logits).scatter_add_(1, ids, (place >= first).float()).gather(1, ids)
    repetition, frequency, presence = past.penalties.t()[..., None]
    x = logits.gather(1, ids)
    x = torch.where(x > 0, x / repetition, x * repetition)
    logits.scatter_(1, ids, x - (frequency * counts + presence * (counts > 0)))


def _edited(
    logits: Tensor, rows: Sequence[RowState], params: RowParams, output_index: Tensor,
    output_index_host: Sequence[int], vocab: VocabRange, past: Past | None,
) -> Tensor:  # fmt: skip
    """A copy of `logits` in float32 after penalties, bias and min_tokens."""
    width = vocab.rows + _BESIDE
    out = torch.empty(logits.shape[0], width, dtype=torch.float32, device=logits.device)
    out[:, : vocab.rows] = logits
    if past is not None:
        penalise(out, past, params, output_index, vocab)
    changes = [r.early if i < r.params.min_tokens else r.changes for r, i in zip(rows, output_index_host, strict=True)]
    places = np.concatenate([row * width + ids for row, (ids, _) in enumerate(changes)], dtype=np.int32)
    if places.size:
        values = np.concatenate([values for _, values in changes])
        at, added = upload(logits.device, places, values.view(np.int32))
        out.view(-1).index_add_(0, at, added.view(torch.float32))
    return out[:, : vocab.rows]


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
    """Only rows that need a filter pay for it, which overwrites them; on one GPU the kernel knows which."""
    filtered = [i for i, r in enumerate(rows) if r.filtered]
    if filtered and logits.is_cuda and vocab.whole:
        filter_rows(logits, params, vocab, 0)
    elif filtered:
        tops = [rows[i].params.top_k or 0 for i in filtered]
        part = filter_rows(logits[filtered], RowParams(params.words[filtered]), vocab, max(tops) if all(tops) else 0)
        logits[filtered] = part.to(logits.dtype)
    return gumbel_argmax(logits, params, output_index, vocab)


def _logprobs(logits: Tensor, rows: Sequence[RowState], out: SampledTokens, vocab: VocabRange) -> None:
    wanted = out.logprob_rows
    num_top = max(rows[i].params.top_logprobs for i in wanted)
    out.logprobs, values, ids = vocab_parallel.token_logprobs(logits[wanted], out.tokens[wanted], num_top, vocab)
    if num_top:
        out.top_logprobs, out.top_ids = values, ids


def sample(
    logits: Tensor, rows: Sequence[RowState], params: RowParams, output_index: Tensor,
    output_index_host: Sequence[int], vocab: VocabRange, past: Past | None = None,
) -> SampledTokens:  # fmt: skip
    """One token a row, the same on every rank.

    Args:
        logits: [R, rows] of `vocab`, of any floating type. rows, params: of the R requests.
        output_index: [R] which output token of its request each row is; the same on the host.
        past: of the R requests, if some are penalised.
    """
    raw = logits
    if any(r.edits_logits for r in rows):
        logits = _edited(logits, rows, params, output_index, output_index_host, vocab, past)
    elif any(r.filtered for r in rows):
        logits = logits.clone()
    tokens = _draw(logits, rows, params, output_index, vocab)
    out = SampledTokens(tokens, [i for i, r in enumerate(rows) if r.params.logprobs])
    if out.logprob_rows:
        _logprobs(raw, rows, out, vocab)
    return out
