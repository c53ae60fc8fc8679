"""Paged attention in C++ against attention written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisgl.kernels.cpu import paged_attention

pytestmark = pytest.mark.usefixtures("threads")
HEADS = ((9, 3, 64), (4, 4, 8), (5, 1, 16), (7, 1, 24), (16, 2, 128), (6, 2, 80), (3, 3, 256))  # query, KV, size
MIXES = (  # sequences: (tokens, of which queries)
    ((1, 1),),
    ((300, 1), (1, 1), (65, 1), (64, 1), (128, 1), (2, 1)),
    ((200, 1), (77, 77), (150, 40), (33, 1), (90, 90)),
    ((130, 130),),
)


def written_out(
    q: Tensor, keys: Tensor, values: Tensor, tokens: list[Tensor], counts: list[int], scale: float, window: int | None
) -> Tensor:
    """`tokens[i]`: the slots of sequence i's tokens, in order."""
    out, row = [], 0
    for slots, count in zip(tokens, counts, strict=True):
        k = keys.flatten(0, 1)[slots].double().repeat_interleave(q.shape[1] // keys.shape[2], 1)
        v = values.flatten(0, 1)[slots].double().repeat_interleave(q.shape[1] // keys.shape[2], 1)
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].double(), k) * scale
        distance = torch.arange(len(slots) - count, len(slots))[:, None] - torch.arange(len(slots))
        hidden = (distance < 0) | (distance >= (window or len(slots)))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        row += count
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 1, 9, 100])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("mix", MIXES, ids=range(len(MIXES)))
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_paged_attention_equals_attention_written_out(
    kernels: str, heads: tuple[int, int, int], mix: tuple[tuple[int, int], ...], page_size: int, window: int | None
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    needed = [-(-total // page_size) for total, _ in mix]
    order = torch.randperm(sum(needed) + 3, generator=generator, dtype=torch.int32)
    table = torch.zeros(len(mix), max(needed), dtype=torch.int32)
    tokens, used = [], 0
    for i, (total, _) in enumerate(mix):
        pages = order[used : used + needed[i]]
        table[i, : needed[i]] = pages
        used += needed[i]
        slots = pages[:, None].long() * page_size + torch.arange(page_size)
        tokens.append(slots.flatten()[:total])
    shape = (len(order), page_size, num_kv_heads, head_dim)
    keys, values = (torch.randn(shape, generator=generator) * 2 for _ in range(2))
    counts = [count for _, count in mix]
    qkv = torch.randn(sum(counts), num_heads + 2, head_dim, generator=generator)
    q = qkv[:, :num_heads]  # as it lies in the model: rows of a wider product
    lens = torch.tensor([total for total, _ in mix], dtype=torch.int32)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    out = paged_attention(q, keys, values, table, lens, starts, 0.3, window)
    assert out.shape == q.shape and out.is_contiguous()
    torch.testing.assert_close(
        out.double(), written_out(q, keys, values, tokens, counts, 0.3, window), rtol=2e-5, atol=2e-5
    )


def test_paged_attention_survives_large_scores(kernels: str) -> None:
    q, keys = torch.full((1, 1, 16), 100.0), torch.randn(2, 16, 1, 16)
    keys[0, 3] = 1000.0  # a score of 1.6e6: the others' weights vanish
    table, lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [20], [0, 1]))
    values = torch.randn(2, 16, 1, 16)
    out = paged_attention(q, keys, values, table, lens, starts, 1.0, None)
    torch.testing.assert_close(out[0, 0], values[0, 3, 0])
    out = paged_attention(-q, keys.abs(), values, table, lens, starts, 1.0, None)
    assert out.isfinite().all()
