"""Prefill attention over the paged pool in Triton: sequences of any number of query tokens, over any prefix.

It is bound by arithmetic (FlashAttention-2: Dao, 2023). A program takes a tile of one sequence's queries: tokens × the
heads that share a KV head, so that these read its keys and values once. Tiles find their sequence on the device; the
grid follows from the number of tokens and of sequences alone.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minisgl.attention.triton_decode import KEPT_GENERAL, LOG2_E
from minisgl.attention.triton_tiles import Tile


@triton.jit(**KEPT_GENERAL)
def _prefill(
    q, q_stride, keys, values, table, table_stride, lens, starts, num_seqs, out, scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # a sequence's last tiles see the most keys: they start first
    seq, query = _locate(tile, starts, num_seqs, QUERIES)
    row = tl.load(starts + seq)
    count = tl.load(starts + seq + 1) - row
    if query >= count:
        return
    length = tl.load(lens + seq)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    places = query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    wanted = ((places < count) & (rows < QUERIES * GROUP))[:, None] & (dims < DIM)[None, :]
    tokens = (row + places).to(tl.int64)
    columns = heads[:, None] * DIM + dims[None, :]
    queries = tl.load(q + tokens[:, None] * q_stride + columns, mask=wanted, other=0.0)

    positions = length - count + places  # of the queries
    lowest = length - count + query
    end = tl.minimum(lowest + QUERIES, length)
    begin = tl.maximum(lowest - window + 1, 0)
    everyone = begin  # from here on all the tile's queries see a key, as far as the window goes
    if WINDOWED:
        everyone += tl.cdiv(tl.maximum(end - window - begin, 0), TOKENS) * TOKENS
        everyone = tl.minimum(everyone, end)
    diagonal = everyone + tl.maximum(lowest + 1 - everyone, 0) // TOKENS * TOKENS  # from here on not all do again

    best = tl.full([ROWS], -1e30, tl.float32)  # finite: rows that see nothing of a tile mustn't become NaN
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    pages_row = table + seq.to(tl.int64) * table_stride
    ahead = begin + tl.arange(0, TOKENS)
    pages = tl.load(pages_row + ahead // PAGE, mask=ahead < length, other=0)
    keys += kv_head * DIM
    values += kv_head * DIM
    if WINDOWED:
        best, total, acc, pages = _attend(
            best, total, acc, pages, queries, keys, values, pages_row, begin, everyone, positions, length, scale,
            window, KV_HEADS, DIM, DIM_PAD, PAGE, TOKENS, True, True,
        )  # fmt: skip
    best, total, acc, pages = _attend(
        best, total, acc, pages, queries, keys, values, pages_row, everyone, diagonal, positions, length, scale,
        window, KV_HEADS, DIM, DIM_PAD, PAGE, TOKENS, False, False,
    )  # fmt: skip
    best, total, acc, pages = _attend(
        best, total, acc, pages, queries, keys, values, pages_row, diagonal, end, positions, length, scale,
        window, KV_HEADS, DIM, DIM_PAD, PAGE, TOKENS, True, False,
    )  # fmt: skip

    result = acc / total[:, None]
    tl.store(out + tokens[:, None] * (KV_HEADS * GROUP * DIM) + columns, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _locate(tile, starts, num_seqs, QUERIES: tl.constexpr):
    """The sequence of a tile, and its first query in it.

    Sequence i has the tiles from (its first row) // QUERIES + i on: at least as many as it needs.
    """
    BLOCK: tl.constexpr = 128
    row = tl.load(starts)
    before = 0
    for start in range(0, num_seqs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        first = (tl.load(starts + i, mask=i < num_seqs, other=0) - row) // QUERIES + i
        before += tl.sum(((first <= tile) & (i < num_seqs)).to(tl.int32), 0)
    seq = before - 1
    first = (tl.load(starts + seq) - row) // QUERIES + seq
    return seq, (tile - first) * QUERIES


@triton.jit
def _attend(
    best, total, acc, pages, queries, keys, values, pages_row, begin, end, positions, length, scale, window,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Adds the keys at `begin` … `end` to the running softmax; `pages` are the page ids of the next tile."""
    dims = tl.arange(0, DIM_PAD)
    for start in tl.range(begin, end, TOKENS):
        places = start + tl.arange(0, TOKENS)
        slots = pages.to(tl.int64) * PAGE + places % PAGE
        offsets = slots[:, None] * (KV_HEADS * DIM) + dims[None, :]
        ahead = places + TOKENS
        pages = tl.load(pages_row + ahead // PAGE, mask=ahead < length, other=0)
        if MASKED:
            seen = (places < length)[:, None] & (dims < DIM)[None, :]
            k = tl.load(keys + offsets, mask=seen, other=0.0)
        elif DIM == DIM_PAD:
            k = tl.load(keys + offsets)
        else:
            k = tl.load(keys + offsets, mask=(dims < DIM)[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = places[None, :] <= positions[:, None]
            if WINDOWED:
                visible = visible & (places[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        if MASKED:
            v = tl.load(values + offsets, mask=seen, other=0.0)
        elif DIM == DIM_PAD:
            v = tl.load(values + offsets)
        else:
            v = tl.load(values + offsets, mask=(dims < DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        best = new_best
    return best, total, acc, pages


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lens: Tensor,
    starts: Tensor,
    num_tokens: int,
    out: Tensor,
    scale: float,
    window: int | None,
    tile: Tile,
) -> None:
    """Causal attention of the last tokens of S sequences.

    Args:
        q: [T, heads, head_dim], each row of heads contiguous.
        keys, values: a layer of the pool, [pages, page_size, kv_heads, head_dim].
        table: [S, P] int32 page ids, of which the first ceil(len / page_size) count.
        lens: [S] int32, the query tokens included.
        starts: [S + 1] int32: sequence i has the rows `starts[i]` … `starts[i + 1]` of q and out.
        num_tokens: at least `starts[S] - starts[0]`.
        out: [T, heads, head_dim], contiguous; these rows of it are written.
        window: positions that a query sees, its own among them; None: all.
    """
    _, heads, dim = q.shape
    _, page, kv_heads, _ = keys.shape
    group, num_seqs = heads // kv_heads, lens.shape[0]
    rows = max(tile.rows, triton.next_power_of_2(group))
    queries = rows // group
    _prefill[kv_heads, num_tokens // queries + num_seqs](
        q, q.stride(0), keys, values, table, table.stride(0), lens, starts, num_seqs, out, scale * LOG2_E,
        2**31 - 1 if window is None else window,
        KV_HEADS=kv_heads, GROUP=group, QUERIES=queries, ROWS=rows, DIM=dim,
        DIM_PAD=triton.next_power_of_2(max(dim, 16)), PAGE=page, TOKENS=tile.tokens, WINDOWED=window is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
