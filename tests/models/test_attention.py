"""The torch attention backend against attention written out."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from minisgl.attention import make_attention
from minisgl.attention.base import ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.types import ConfigError

HEAD_DIM = 8


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """`q` [n, heads, d] are the last n of the sequence `k`, `v` [L, kv_heads, d]; in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        position = k.shape[0] - q.shape[0] + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(q.shape[1]):
            keys, values = k[first : position + 1, head // group], v[first : position + 1, head // group]
            weights = torch.softmax(keys @ q[row, head] * scale, 0)
            out[row, head] = weights @ values
    return out


def make_batch(
    lens: list[int], counts: list[int], kv_heads: int, page_size: int, seed: int, runs: bool
) -> ForwardBatch:
    """Sequences of random keys and values; `runs`: whose pages follow one another."""
    torch.manual_seed(seed)
    pages = [-(-n // page_size) for n in lens]
    order = list(range(sum(pages)))
    if not runs:
        random.Random(seed).shuffle(order)
    table = np.zeros((len(lens), max(pages)), np.int32)
    for row, n in zip(table, pages, strict=True):
        row[:n] = [order.pop(0) for _ in range(n)]
    pool = KVPool(1, kv_heads, HEAD_DIM, page_size, sum(pages), torch.float32, "cpu")
    pool.k.normal_()
    pool.v.normal_()
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    ids = torch.zeros(sum(counts), dtype=torch.int32)
    return ForwardBatch(
        input_ids=ids,
        positions=ids,
        slots=ids.long(),
        page_table=torch.from_numpy(table),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        query_starts=starts,
        logits_indices=ids.long(),
        num_decodes=sum(c == 1 and n > 1 for c, n in zip(counts, lens, strict=True)),
        seq_lens_host=np.array(lens, np.int32),
        query_lens_host=np.array(counts, np.int32),
        pool=pool,
        attention=make_attention("torch_sdpa"),
    )


MIXES = {
    "one decode": ([37], [1]),
    "decodes of all lengths": ([2, 3, 9, 30, 31, 33, 64, 65, 100], [1] * 9),
    "one whole prompt": ([29], [29]),
    "one chunk": ([50], [13]),
    "prompt of one token": ([1], [1]),
    "mixed": ([40, 7, 41, 25, 60, 1, 33], [1, 1, 1, 25, 20, 1, 32]),
}


@pytest.mark.parametrize("window", [None, 1, 10, 1000])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_size", "runs"), [(4, 4, 1, False), (6, 2, 16, True), (7, 1, 4, False)]
)
def test_torch_sdpa_equals_attention_written_out(
    mix: str, window: int | None, heads: int, kv_heads: int, page_size: int, runs: bool
) -> None:
    lens, counts = MIXES[mix]
    batch = make_batch(lens, counts, kv_heads, page_size, seed=len(mix), runs=runs)
    q = torch.randn(sum(counts), heads + 2, HEAD_DIM)[:, :heads]  # strided, as the model hands it over
    scale = 1 / math.sqrt(HEAD_DIM)
    batch.attention.prepare(batch)
    got = batch.attention.forward(q, 0, batch, scale, window)
    assert got.is_contiguous()
    assert got.shape == q.shape
    keys, values = batch.pool.slots(0)
    row = 0
    for table, length, count in zip(batch.page_table, lens, counts, strict=True):
        slots = [int(table[p // page_size]) * page_size + p % page_size for p in range(length)]
        expected = written_out(q[row : row + count], keys[slots], values[slots], scale, window)
        torch.testing.assert_close(got[row : row + count].double(), expected, rtol=1e-5, atol=1e-5)
        row += count


def test_make_attention_names_the_backends_it_knows() -> None:
    with pytest.raises(ConfigError, match="torch_sdpa"):
        make_attention("nonesuch")
