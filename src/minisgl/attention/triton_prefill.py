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
    q, q_stride, keys, values, k_scale, v_scale, table, table_stride, lens, starts, num_seqs, out, scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
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
    which = query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    wanted = ((which < count) & (rows < QUERIES * GROUP))[:, None] & (dims < DIM)[None, :]
    tokens = (row + which).to(tl.int64)
    columns = heads[:, None] * DIM + dims[None, :]
    queries = tl.load(q + tokens[:, None] * q_stride + columns, mask=wanted, other=0.0)

    positions = length - count + which  # of the queries
    lowest = length - count + query
    begin = tl.maximum(lowest - window + 1, 0)
    end = tl.minimum(lowest + QUERIES, length)
    if k_scale is not None:
        scale *= tl.load(k_scale + kv_head)
    best = tl.full([ROWS], -1e30, tl.float32)  # finite: rows that see nothing of a tile mustn't become NaN
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    table += seq.to(tl.int64) * table_stride
    ahead = begin + tl.arange(0, TOKENS)
    pages = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
    for start in tl.range(begin, end, TOKENS):
        places = start + tl.arange(0, TOKENS)
        slots = (pages.to(tl.int64) if WIDE else pages) * PAGE + places % PAGE
        offsets = slots[:, None] * (KV_HEADS * DIM) + (kv_head * DIM + dims)[None, :]
        ahead = places + TOKENS  # page ids a tile early: the loads of keys and values then depend on no other load
        pages = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
        inside = (places < end)[:, None] & (dims < DIM)[None, :]
        k = tl.load(keys + offsets, mask=inside, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if (start + TOKENS > lowest + 1) | (start < end - window):  # not all of the queries see all of these keys
            seen = (places[None, :] <= positions[:, None]) & (places[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values + offsets, mask=inside, other=0.0).to(queries.dtype)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        best = new_best

    if v_scale is not None:
        acc *= tl.load(v_scale + kv_head)
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


def prefill(
    q: Tensor, keys: Tensor, values: Tensor, scales: tuple[Tensor | None, Tensor | None], table: Tensor, lens: Tensor,
    starts: Tensor, num_tokens: int, out: Tensor, scale: float, window: int | None, tile: Tile,
) -> None:  # fmt: skip
    """Causal attention of the last tokens of S sequences.

    Args:
        q: [T, heads, head_dim], each row of heads contiguous.
        keys, values: a layer of the pool, [pages, page_size, kv_heads, head_dim].
        scales: factors on keys and on values, [kv_heads] float32; None: 1.
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
        q, q.stride(0), keys, values, *scales, table, table.stride(0), lens, starts, num_seqs, out, scale * LOG2_E,
        2**31 - 1 if window is None else window,
        KV_HEADS=kv_heads, GROUP=group, QUERIES=queries, ROWS=rows, DIM=dim,
        DIM_PAD=triton.next_power_of_2(max(dim, 16)), PAGE=page, TOKENS=tile.tokens, WIDE=keys.numel() >= 2**31,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
