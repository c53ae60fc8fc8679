"""The Triton backend against attention in float64: under Triton's interpreter, and (marked cuda) on a GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from minisgl.attention import make_attention
from minisgl.attention.base import ForwardBatch
from minisgl.cache.pool import FP8, KVPool
from minisgl.types import ConfigError

pytest.importorskip("triton")

from minisgl.attention import triton_paged
from minisgl.attention.triton_decode import Splits, rank
from minisgl.attention.triton_paged import TritonPaged
from minisgl.attention.triton_tiles import Tile, many_short, prefill_tile

INTERPRETED = not torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Geometry:
    """Shapes that a model fixes, and the pool's page."""

    heads: int
    kv_heads: int
    dim: int
    page_size: int
    dtype: torch.dtype = torch.float32
    fp8: bool = False  # the pool

    @property
    def device(self) -> str:
        return "cpu" if INTERPRETED else "cuda"


def make_pool(g: Geometry, tables: list[list[int]], lens: list[int], num_pages: int, rng: torch.Generator) -> KVPool:
    """Random keys and values where a sequence has a token; NaN wherever else."""
    pool = KVPool(1, g.kv_heads, g.dim, g.page_size, num_pages, torch.float32, "cpu")
    pool.k_scale, pool.v_scale = pool.k_scale.to(g.device), pool.v_scale.to(g.device)
    pool.k.fill_(torch.nan)
    pool.v.fill_(torch.nan)
    for pages, length in zip(tables, lens, strict=True):
        slots = [pages[p // g.page_size] * g.page_size + p % g.page_size for p in range(length)]
        for half in pool.slots(0):
            half[slots] = torch.randn(length, g.kv_heads, g.dim, generator=rng)
    if g.fp8:
        pool.quantised = True
        pool.k_scale, pool.v_scale = (torch.rand(2, 1, g.kv_heads, generator=rng) + 0.5).to(g.device)
    dtype = FP8 if g.fp8 else g.dtype
    pool.k, pool.v = pool.k.to(g.device, dtype), pool.v.to(g.device, dtype)
    return pool


def make_batch(g: Geometry, lens: list[int], counts: list[int], seed: int, backend: TritonPaged) -> ForwardBatch:
    """Sequences of `lens` tokens, the last `counts` of them this step's, on pages in random order."""
    needed = [-(-n // g.page_size) for n in lens]
    free = list(range(sum(needed) + 3))
    random.Random(seed).shuffle(free)
    tables = [[free.pop() for _ in range(n)] for n in needed]
    pool = make_pool(g, tables, lens, sum(needed) + 3, torch.Generator().manual_seed(seed))
    table = np.full((len(lens), max(needed) + seed % 3), pool.dummy_page, np.int32)
    for row, pages in zip(table, tables, strict=True):
        row[: len(pages)] = pages
    ids = torch.zeros(sum(counts), dtype=torch.int32, device=g.device)
    return ForwardBatch(
        input_ids=ids,
        positions=ids,
        slots=ids.long(),
        page_table=torch.from_numpy(table).to(g.device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=g.device),
        query_starts=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=g.device),
        logits_indices=ids.long(),
        num_decodes=next((i for i, (n, c) in enumerate(zip(lens, counts, strict=True)) if c > 1 or n == 1), len(lens)),
        seq_lens_host=np.array(lens, np.int32),
        query_lens_host=np.array(counts, np.int32),
        pool=pool,
        attention=backend,
    )


def make_queries(g: Geometry, tokens: int, seed: int) -> Tensor:
    """[tokens, heads, dim], strided, as a model hands it over."""
    wide = torch.randn(tokens, g.heads + 2 * g.kv_heads, g.dim, generator=torch.Generator().manual_seed(seed))
    return wide.to(g.device, g.dtype)[:, : g.heads]


def reference(q: Tensor, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
    """Softmax over the visible keys, sequence by sequence, in float64."""
    outs, row = [], 0
    size, lens = batch.pool.page_size, batch.seq_lens.tolist()
    for i, (length, count) in enumerate(zip(lens, batch.query_starts.diff().tolist(), strict=True)):
        places = torch.arange(length, device=q.device)
        slots = batch.page_table[i].long()[places // size] * size + places % size
        k, v = (
            (half[slots].double() * scales[0, :, None]).repeat_interleave(q.shape[1] // half.shape[1], 1)
            for half, scales in zip(batch.pool.slots(0), (batch.pool.k_scale, batch.pool.v_scale), strict=True)
        )
        positions = torch.arange(length - count, length, device=q.device)[:, None]
        hidden = places > positions
        if window is not None:
            hidden |= places <= positions - window
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].double(), k) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        row += count
    return torch.cat(outs)


def poisoned(*args: Any, **kwargs: Any) -> Tensor:
    """torch.empty, but what nobody writes shows."""
    return torch.full(*args, torch.nan, **kwargs) if len(args) == 1 else torch.full(args, torch.nan, **kwargs)


def error(got: Tensor, expected: Tensor) -> float:
    """The largest relative error of any head's output; NaN if there is one."""
    difference = (got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(difference.max())


def check(
    g: Geometry, lens: list[int], counts: list[int], window: int | None, splits: Splits | None, seed: int = 0
) -> None:
    batch = make_batch(g, lens, counts, seed, TritonPaged(splits))
    q, scale = make_queries(g, sum(counts), seed), g.dim**-0.5
    batch.attention.prepare(batch)
    with mock.patch.object(torch, "empty", poisoned):
        got = batch.attention.forward(q, 0, batch, scale, window)
    assert got.shape == q.shape and got.dtype == q.dtype and got.is_contiguous()
    assert error(got, reference(q, batch, scale, window)) < TOLERANCE[g.dtype]


MANY, ONE = Splits(32, 24), Splits(32, 1)
MIXES = {
    "one decode": ([37], [1]),
    "decodes at page borders": ([2, 15, 16, 17, 31, 32, 33, 64, 65, 130], [1] * 10),
    "prompts of one token": ([1, 1], [1, 1]),
    "one chunk": ([90], [33]),
    "chunks at tile borders": ([16, 17, 40, 70], [16, 17, 15, 1]),
    "mixed": ([40, 7, 130, 25, 60, 1, 33], [1, 1, 1, 25, 20, 1, 32]),
}
SMALL = (
    Geometry(3, 3, 8, 1),
    Geometry(6, 2, 64, 16),
    Geometry(7, 1, 80, 48),
    Geometry(5, 1, 16, 4, torch.float16),
    Geometry(17, 1, 32, 2),
    Geometry(6, 2, 16, 16, torch.float32, fp8=True),
    Geometry(4, 4, 24, 4, torch.float16, fp8=True),
)  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="the tests marked cuda do more")
@pytest.mark.parametrize(
    ("window", "splits"), [(None, ONE), (None, MANY), (1, None), (20, Splits(32, 2)), (1000, None)]
)
@pytest.mark.parametrize("mix", MIXES)
def test_triton_interpreted_equals_reference(mix: str, window: int | None, splits: Splits | None) -> None:
    for seed, geometry in enumerate(SMALL[:2]):
        check(geometry, *MIXES[mix], window, splits, seed)


@pytest.mark.skipif(not INTERPRETED, reason="the tests marked cuda do more")
@pytest.mark.parametrize("geometry", SMALL[2:], ids=str)
def test_triton_interpreted_equals_reference_at_odd_geometries(geometry: Geometry) -> None:
    check(geometry, *MIXES["mixed"], 20, MANY)
    check(geometry, *MIXES["mixed"], None, None, seed=1)


def test_triton_finds_the_rows_of_a_larger_table() -> None:
    """As captured steps hand the table over: every running request's row, in whatever order the batch has them."""
    g, rows = SMALL[1], [7, 0, 4]
    batch = make_batch(g, [40, 2, 130], [1, 1, 1], 0, TritonPaged(MANY))
    expected = reference(make_queries(g, 3, 0), batch, 0.3, None)
    whole = torch.full((9, batch.page_table.shape[1] + 5), 10**6, dtype=torch.int32, device=g.device)
    whole[rows, : batch.page_table.shape[1]] = batch.page_table
    batch.page_table, batch.table_rows = whole[:, :-3], torch.tensor(rows, dtype=torch.int32, device=g.device)
    for splits in (MANY, ONE):
        batch.attention = TritonPaged(splits)
        batch.attention.prepare(batch)
        got = batch.attention.forward(make_queries(g, 3, 0), 0, batch, 0.3, None)
        assert error(got, expected) < TOLERANCE[g.dtype]


def test_triton_gives_zeros_for_padding_rows() -> None:
    g = SMALL[0]
    batch = make_batch(g, [40, 2, 70], [1, 1, 1], 0, TritonPaged(MANY))
    batch.seq_lens[1] = 0
    batch.attention.prepare(batch)
    with mock.patch.object(torch, "empty", poisoned):
        got = batch.attention.forward(make_queries(g, 3, 0), 0, batch, 0.3, None)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert not got.isnan().any()


@pytest.mark.parametrize("count", [1, 15, 16, 130, 300])
def test_rank_puts_the_longest_first(count: int) -> None:
    lens = torch.randint(0, 40, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(count))
    order = rank(lens.to(SMALL[0].device))
    assert order.tolist() == sorted(range(count), key=lambda i: -lens[i])


def test_triton_equals_reference_with_the_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    g = SMALL[1]
    batch = make_batch(g, [40, 2, 130, 70, 71], [1] * 5, 0, TritonPaged())
    monkeypatch.setattr(triton_paged, "SMS_UNKNOWN", 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: mock.Mock(multi_processor_count=4, major=8))
    batch.attention.prepare(batch)
    assert batch.plan.order.tolist() == [2, 4, 3, 0, 1]
    q = make_queries(g, 5, 0)
    assert error(batch.attention.forward(q, 0, batch, 0.3, None), reference(q, batch, 0.3, None)) < TOLERANCE[g.dtype]


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("fp8", [False, True])
def test_triton_equals_reference_with_order_splits_and_table_rows_together(
    fp8: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padding row among them, which is the shortest and comes last."""
    g = replace(SMALL[1], fp8=fp8, dtype=torch.float16 if fp8 else SMALL[1].dtype)
    batch = make_batch(g, [40, 2, 130, 70, 71, 1], [1] * 5 + [1], 0, TritonPaged())
    q = make_queries(g, 6, 0)
    expected = reference(q, batch, 0.3, window)[[0, 1, 2, 3, 4]]
    rows = torch.tensor([3, 5, 0, 1, 4, 2], dtype=torch.int32, device=g.device)
    batch.page_table = batch.page_table[torch.argsort(rows)]
    batch.table_rows, batch.num_decodes, batch.seq_lens[5] = rows, 6, 0
    sms = mock.Mock(multi_processor_count=2, major=8)
    monkeypatch.setattr(triton_paged, "SMS_UNKNOWN", 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: sms)
    monkeypatch.setattr("minisgl.attention.triton_decode.LONG", 64)
    batch.attention.prepare(batch)
    assert batch.plan.order.tolist() == [2, 4, 3, 0, 1, 5] and batch.plan.splits.most > 1
    got = batch.attention.forward(q, 0, batch, 0.3, window)
    assert error(got[:5], expected) < TOLERANCE[g.dtype]
    assert not got[5].any()


@pytest.mark.parametrize("programs", [1, 8, 64, 256, 1024, 8192])
@pytest.mark.parametrize("max_len", [1, 700, 40_960, 1_000_000])
def test_splits_fill_the_gpu_within_bounds(programs: int, max_len: int) -> None:
    splits = Splits.choose(programs, 1, max_len, 132)
    assert splits.chunk % 32 == 0
    assert 1 <= splits.most
    assert splits.most == 1 or splits.most * programs <= 4096
    assert splits.most == 1 or (splits.most - 1) * splits.chunk < max_len


@pytest.mark.parametrize(
    ("num_tokens", "lens", "short"),
    [
        (32 * 512, [512] * 32, True),
        (9 * 1023, [1023] * 9, True),
        (9 * 1024, [1024] * 9, False),
        (8 * 2048, [2048] * 8, False),
        (64 * 256, [6000] * 64, False),  # over prefixes
        (16 * 512, [512] * 16, False),  # too small a step
        (16_384, [], False),  # a captured step, whose prompts may be of any length
    ],
)
def test_short_prompts_get_a_tile_of_their_own_in_large_steps(num_tokens: int, lens: list[int], short: bool) -> None:
    assert many_short(num_tokens, np.array(lens, np.int32)) == short


def test_tile_of_short_prompts_is_for_heads_of_128_on_hopper() -> None:
    def tiles(dim: int, dtype: torch.dtype, shared_bytes: int) -> list[Tile]:
        return [prefill_tile(dim, dtype, shared_bytes, short) for short in (False, True)]

    hopper, ada = 232_448, 101_376
    assert tiles(128, torch.bfloat16, hopper) == [Tile(128, 64, 8, 3), Tile(64, 32, 4, 3)]
    for other in ((64, torch.bfloat16, hopper), (128, torch.float32, hopper), (128, torch.bfloat16, ada)):
        usual, short = tiles(*other)
        assert usual == short


@pytest.mark.parametrize(
    ("fp8", "lens", "short"), [(False, [130, 40, 50], True), (False, [9, 40, 120], False), (True, [9, 40, 50], False)]
)
def test_plan_knows_steps_of_short_prompts(
    monkeypatch: pytest.MonkeyPatch, fp8: bool, lens: list[int], short: bool
) -> None:
    monkeypatch.setattr("minisgl.attention.triton_tiles._MANY", 60)
    monkeypatch.setattr("minisgl.attention.triton_tiles._SHORT", 60)
    batch = make_batch(replace(SMALL[1], fp8=fp8), lens, [1, 35, 33], 0, TritonPaged())
    batch.attention.prepare(batch)
    assert batch.plan.short == short


def test_make_attention_says_what_triton_lacks() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(ConfigError, match="pip install"):
        make_attention("triton")
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}),
        pytest.raises(ConfigError, match="torch_sdpa"),
    ):
        make_attention("triton")


# -- on a GPU ---------------------------------------------------------------------------------------------------------

HEADS = ((16, 8, 128), (9, 3, 64), (5, 1, 96), (7, 1, 80), (8, 1, 256), (14, 2, 64), (3, 3, 128), (40, 2, 128))
PAGES = (1, 16, 64, 2, 48, 4, 32, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def geometries() -> Iterator[Geometry]:
    """Every shape of heads in every dtype, each with two page sizes; between them they have all."""
    for i, heads in enumerate(HEADS):
        for j, dtype in enumerate(DTYPES):
            for page_size in (16, PAGES[(3 * i + j) % len(PAGES)]):
                if page_size != 16 or (i + j) % 2:
                    yield Geometry(*heads, page_size, dtype)
    if INTERPRETED or torch.cuda.get_device_capability() >= (9, 0):
        for heads, page_size in zip(HEADS, PAGES, strict=True):
            yield Geometry(*heads, page_size, torch.bfloat16, fp8=True)


def random_lens(seed: int, longest: int) -> tuple[list[int], list[int]]:
    """Decodes, then extending sequences; either may be none."""
    rng = random.Random(seed)
    borders = (2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 256)
    decodes = [rng.choice((rng.choice(borders), rng.randint(2, longest))) for _ in range(rng.choice((0, 1, 5, 40)))]
    extends = [
        rng.choice((1, rng.choice(borders), rng.randint(1, longest))) for _ in range(rng.randint(not decodes, 5))
    ]
    counts = [rng.choice((n, rng.randint(1, n), 1, min(n, 64))) for n in extends]
    order = sorted(range(len(extends)), key=lambda i: counts[i] == 1 and extends[i] > 1)  # first no decode
    return decodes + [extends[i] for i in order], [1] * len(decodes) + [counts[i] for i in order]


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("geometry", list(geometries()), ids=str)
def test_triton_equals_reference(geometry: Geometry, window: int | None) -> None:
    for seed, splits in enumerate((ONE, MANY, Splits(64, 3), None, None, MANY)):
        check(geometry, *random_lens(seed + geometry.dim, 700), window, splits, seed)
    check(geometry, *MIXES["decodes at page borders"], 1, MANY)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_equals_reference_over_long_contexts(dtype: torch.dtype) -> None:
    g = Geometry(16, 8, 128, 16, dtype)
    check(g, [9000], [1], None, None)
    check(g, [5000, 3], [1, 1], 4000, None)
    check(g, [100, 6000, 4000], [1, 300, 1500], None, None)
    check(g, [50] * 300 + [700], [1] * 300 + [260], None, None)
    check(g, [70] * 300, [70] * 300, None, None)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_graph_replays_with_other_lengths(dtype: torch.dtype) -> None:
    g, most = Geometry(16, 8, 128, 16, dtype), 900
    batch = make_batch(g, [most] * 5, [1] * 5, 0, TritonPaged())
    q, scale = make_queries(g, 5, 0), 0.1
    batch.attention.prepare(batch)
    for _ in range(2):
        batch.attention.forward(q, 0, batch, scale, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = batch.attention.forward(q, 0, batch, scale, None)
    for lens in ([1, 2, 3, 31, 32], [33, 500, 900, 64, 899], [900] * 5, [1] * 5, [16, 129, 640, 17, 65]):
        batch.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        batch.page_table.copy_(batch.page_table[torch.randperm(5)])
        q.copy_(torch.randn(q.shape))
        graph.replay()
        assert error(got, reference(q, batch, scale, None)) < TOLERANCE[dtype]


@pytest.mark.cuda
def test_triton_graph_replays_prefills_in_a_token_bucket() -> None:
    g, tokens = Geometry(9, 3, 64, 16, torch.bfloat16), 96
    batch = make_batch(g, [400] * 4, [24] * 4, 0, TritonPaged())
    q, scale = make_queries(g, tokens, 0), 0.1
    batch.attention.prepare(batch)
    batch.attention.forward(q, 0, batch, scale, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = batch.attention.forward(q, 0, batch, scale, None)
    for lens, counts in (([400, 90, 33, 2], [1, 90, 3, 2]), ([64, 50, 1, 0], [40, 50, 1, 0]), ([400] * 4, [24] * 4)):
        batch.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        batch.query_starts.copy_(torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32))
        graph.replay()
        assert error(got[: sum(counts)], reference(q, batch, scale, None)) < TOLERANCE[g.dtype]


@pytest.mark.cuda
def test_triton_prepares_and_runs_without_synchronising() -> None:
    g = Geometry(16, 8, 128, 16, torch.bfloat16)
    batch = make_batch(g, [900, 30, 500], [1, 1, 70], 0, TritonPaged())
    q = make_queries(g, 72, 0)
    batch.attention.prepare(batch)
    batch.attention.forward(q, 0, batch, 0.1, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.attention.prepare(batch)
        batch.attention.forward(q, 0, batch, 0.1, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
