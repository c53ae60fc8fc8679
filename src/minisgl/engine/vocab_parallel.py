"""Choosing among logits that ranks share: each has those of its own token ids, [R, rows] of a `VocabRange`.

Ranks exchange (value, id) pairs of what each finds best, not the logits. Of equal values the smaller id wins, as it
does on one rank. Every rank ends up with the same answer, and the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.models.sharding import VocabRange

_LOW = 0xFFFFFFFF


def pack_pairs(values: Tensor, ids: Tensor) -> Tensor:
    """Pairs of float32 values and ids (int64, below 2^32) as int64 that sort: the larger value, then the smaller id.

    Floats compare as their bits do, once those of negative numbers are flipped; adding 0 makes -0 and 0 one value.
    """
    bits = (values + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LOW - ids)


def unpack_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The values and ids of `pack_pairs`."""
    bits = (pairs >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), _LOW - (pairs & _LOW)


def best_of_ranks(values: Tensor, ids: Tensor, vocab: VocabRange) -> Tensor:
    """Of each rank's best ids [R] and their values [R] float32, the best: [R] int64.

    Ranks hold ids in their own order, so that the first of equal values is the one with the smallest id.
    """
    ranks = vocab.tp.all_gather(torch.stack((values.view(torch.int32), ids.to(torch.int32)), dim=-1))  # [R, 2 x size]
    best = ranks[:, ::2].view(torch.float32).argmax(-1, keepdim=True)
    return ranks[:, 1::2].gather(1, best)[:, 0].long()


def largest(logits: Tensor, count: int, vocab: VocabRange) -> tuple[Tensor, Tensor]:
    """Values and ids [R, count] of the largest logits [R, rows] float32 of all ranks, in order."""
    ids = vocab.start + torch.arange(vocab.rows, device=logits.device)
    own = pack_pairs(logits, ids).topk(min(count, vocab.rows), dim=-1).values
    return unpack_pairs(vocab.tp.all_gather(own).topk(count, dim=-1).values)


def candidates(logits: Tensor, count: int, vocab: VocabRange) -> tuple[Tensor, Tensor]:
    """As `largest`; or all logits [R, vocab_size], by id, where those cost no more to exchange, or `count` is 0."""
    if 0 < 2 * count * vocab.tp.size < vocab.vocab_size:  # a pair is as wide as two logits
        return largest(logits, count, vocab)
    everything = vocab.tp.all_gather(logits)[:, : vocab.vocab_size]
    return everything, torch.arange(vocab.vocab_size, device=logits.device).expand_as(everything)


def own_part(values: Tensor, ids: Tensor, vocab: VocabRange) -> Tensor:
    """Of `candidates`, those of this rank's ids, each in its place of [R, rows]; -inf where there is none."""
    out = values.new_full((values.shape[0], vocab.rows + 1), float("-inf"))
    return out.scatter_(1, vocab.local(ids), values)[:, : vocab.rows]


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int, vocab: VocabRange) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `tokens` [R], and values and ids [R, num_top] of the most likely, before any sampling.

    Args:
        logits: [R, rows], of any floating type.
    """
    logits = logits.float()
    if vocab.whole:
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(1, tokens[:, None])[:, 0], *logprobs.topk(num_top, dim=-1)
    place = vocab.local(tokens)[:, None]
    own = logits.gather(1, place.clamp(max=vocab.rows - 1)).masked_fill_(place == vocab.rows, float("-inf"))
    ranks = vocab.tp.all_gather(torch.cat((own, logits.logsumexp(-1, keepdim=True)), dim=-1))
    total = ranks[:, 1::2].logsumexp(-1)
    values, ids = largest(logits, num_top, vocab) if num_top else (logits[:, :0], place[:, :0])
    return ranks[:, ::2].amax(-1) - total, values - total[:, None], ids
