"""Tokens chosen in C++ against argmax over the noise that every implementation shares."""

from __future__ import annotations

import pytest
import torch

from minisgl.kernels.cpu import sample_tokens
from minisgl.kernels.sample.noise import gumbel_noise


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (1, 1), (3, 7), (5, 8193), (2, 49152), (40, 131)])
def test_sampled_tokens_are_those_of_the_shared_noise(rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab + 3, generator=generator)[:, :vocab] * 4
    temperature = torch.rand(rows, generator=generator) + 0.2
    temperature[1::3] = 0
    logits[:, vocab // 2 :: 2] = -torch.inf  # as filters leave them
    logits[:, 0] = 0
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    index = torch.randint(0, 1 << 20, (rows,), generator=generator, dtype=torch.int32)
    tokens = sample_tokens(logits, temperature, seeds, index)
    noise = gumbel_noise(seeds, index.long(), vocab)
    greedy = (temperature == 0)[:, None]
    noisy = torch.where(greedy, logits, logits / temperature[:, None] + noise)
    best = noisy.max(-1).values
    torch.testing.assert_close(noisy.gather(1, tokens[:, None])[:, 0], best, rtol=0, atol=2e-6)


def test_sampled_tokens_of_equal_logits_are_the_first() -> None:
    logits = torch.zeros(1, 20000)
    logits[0, [19999, 8192, 300]] = 1.0
    zero = torch.zeros(1, dtype=torch.int64)
    assert sample_tokens(logits, torch.zeros(1), zero, zero).tolist() == [300]
