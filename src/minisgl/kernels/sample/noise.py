"""Random numbers for sampling: Philox, so that a token's noise depends on nothing but its place.

Philox4x32-10 (Salmon et al., 'Parallel Random Numbers: As Easy as 1, 2, 3', SC 2011) maps (key, counter) to four
32-bit words. Key: the request's seed; counter: (token id // 4, output index); word: token id % 4. The noise is then
the same on every rank, for any batch and any part of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def _mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit product; int64 wraps as uint64 does, and the mask removes the sign's copies."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the key `seed` (int64, both halves) and a counter of up to four words, zero where not given.

    All arguments int64 and broadcastable, counter words in [0, 2^32); returns four int64 tensors of 32-bit words.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    x0, x1, x2, x3 = (*counter, *[zero] * (4 - len(counter)))
    for _ in range(10):
        hi0, lo0 = _mul(_M0, x0)
        hi1, lo1 = _mul(_M1, x2)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return x0, x1, x2, x3


def gumbel_noise(seeds: Tensor, output_index: Tensor, vocab_size: int, first: int = 0) -> Tensor:
    """Standard Gumbel noise for every token: argmax(logits + noise) samples from softmax(logits).

    Args:
        seeds: [R] int64. output_index: [R] int64, which output token of its request each row is.
        vocab_size, first: how many ids, and the first of them, a multiple of 4.

    Returns:
        [R, vocab_size] float32.
    """
    blocks = torch.arange(first // 4, (first + vocab_size + 3) // 4, dtype=torch.int64, device=seeds.device)
    words = philox(seeds[:, None], blocks[None, :], output_index[:, None])
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    # -log(-log(1 - u)): small u, where float32 is fine-grained, makes the large noise that decides
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
