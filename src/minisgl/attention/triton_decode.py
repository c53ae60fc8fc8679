"""Decode attention over the paged pool in Triton: one query token a sequence.

It is bound by memory: each key and each value is read once. All sequences are cut into tiles of tokens, and the tiles
dealt out evenly: a program takes one KV head over a run of tiles that may end one sequence, hold others whole and begin
another (the idea of stream-K: Osama and others, 2023). So every program reads as much as any other, however long the
sequences are, and one sequence alone fills the GPU. The query heads that share a KV head are the rows of the matrix
products. Where a sequence is shared by several programs, each leaves its part, and the last to arrive weighs them all
(flash-decoding's combination: Dao and others, 2023), always in the same order.

The grid follows from the hardware alone; who reads what is settled on the device, once a step, from the lengths
there (`Schedule`): a captured graph stays right while sequences grow.

Programmatic dependent launch: the kernel waits before it reads what another kernel wrote, and lets the next one start
right after, to wait in turn.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.attention.triton_tiles import Tile

LOG2_E = 1.4426950408889634  # scores become powers of two
NO_WINDOW = 2**31 - 1

# Integers and views that change from step to step must not each bring a compilation of their own.
KEPT_GENERAL = {
    "do_not_specialize": ["table_stride", "num_seqs", "window", "runs"],
    "do_not_specialize_on_alignment": ["table", "table_rows", "lens", "starts", "k_scale", "v_scale"],
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which program reads which tiles, for all layers of a step that have the same window."""

    ends: Tensor  # [S + 1] int32: 0, then the tiles of the first sequences, summed
    first: Tensor  # [runs] int32: the sequence that a run begins in
    window: int

    @staticmethod
    def make(lens: Tensor, window: int | None, tile: Tile, runs: int) -> Schedule:
        """Deals the tiles of sequences of `lens` tokens, [S] int32, to `runs` programs a KV head; on the device."""
        ends = torch.empty(len(lens) + 1, dtype=torch.int32, device=lens.device)
        first = torch.empty(runs, dtype=torch.int32, device=lens.device)
        window = NO_WINDOW if window is None else window
        _schedule[triton.cdiv(runs, 32),](lens, len(lens), window, runs, ends, first, TOKENS=tile.tokens, BLOCK=32)
        return Schedule(ends, first, window)


@dataclass(frozen=True, slots=True)
class Parts:
    """What programs leave of sequences that they share. A run has two at most: where it begins, and where it ends."""

    out: Tensor  # [runs, 2, kv_heads, group, head_dim] float32
    lse: Tensor  # [runs, 2, kv_heads, group] float32: log2 of the sum of 2^score
    arrived: Tensor  # [runs, kv_heads] int32: parts of the sequence that begins, but doesn't end, in a run; 0 at rest

    @staticmethod
    def allocate(runs: int, kv_heads: int, group: int, head_dim: int, device: torch.device) -> Parts:
        out = torch.empty(runs, 2, kv_heads, group, head_dim, device=device)
        arrived = torch.zeros(runs, kv_heads, dtype=torch.int32, device=device)
        return Parts(out, torch.empty(out.shape[:-1], device=device), arrived)


@triton.jit(**KEPT_GENERAL)
def _schedule(lens, num_seqs, window, runs, ends, first, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    SEQS: tl.constexpr = 128
    total = 0
    for base in range(0, num_seqs, SEQS):
        total += tl.sum(_tiles(lens, base + tl.arange(0, SEQS), num_seqs, window, TOKENS), 0)
    run = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = run.to(tl.int64) * total // tl.minimum(runs, total)
    before = tl.zeros([BLOCK], tl.int32)  # sequences that end at or before the run's first tile
    carry = 0
    for base in range(0, num_seqs, SEQS):
        seq = base + tl.arange(0, SEQS)
        tiles = _tiles(lens, seq, num_seqs, window, TOKENS)
        upto = carry + tl.cumsum(tiles, 0)
        carry += tl.sum(tiles, 0)
        tl.store(ends + 1 + seq, upto, mask=(seq < num_seqs) & (tl.program_id(0) == 0))
        over = (upto[None, :] <= begin[:, None]) & (seq < num_seqs)[None, :]
        before += tl.sum(over.to(tl.int32), 1)
    tl.store(first + run, before, mask=run < runs)
    tl.store(ends, 0, mask=tl.program_id(0) == 0)


@triton.jit
def _tiles(lens, seq, num_seqs, window, TOKENS: tl.constexpr):
    """Tiles of a sequence: one at least, so that somebody writes zeros for an empty one, which is padding."""
    seen = tl.minimum(tl.load(lens + seq, mask=seq < num_seqs, other=0), window)
    return tl.where(seq < num_seqs, tl.maximum(tl.cdiv(seen, TOKENS), 1), 0)


@triton.jit
def _begin(run, total, runs):
    """The first tile of a run: tiles are dealt in order, to within one the same number to each."""
    return (run.to(tl.int64) * total // runs).to(tl.int32)


@triton.jit
def _owner(tile, total, runs):
    """The run that has a tile: the inverse of `_begin`."""
    return (((tile + 1).to(tl.int64) * runs - 1) // total).to(tl.int32)


@triton.jit(**KEPT_GENERAL)
def _decode(
    q, q_stride, keys, values, k_scale, v_scale, table, table_stride, table_rows, lens, ends, first, out, part_out,
    part_lse, arrived, scale, num_seqs, window, runs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head, run = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.load(ends + num_seqs)
    seq = tl.load(first + run)
    runs = tl.minimum(runs, total)
    if run >= runs:
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    heads = kv_head * GROUP + rows
    wanted = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    if k_scale is not None:
        scale *= tl.load(k_scale + kv_head)
    tile, stop = _begin(run, total, runs), _begin(run + 1, total, runs)
    while tile < stop:
        seq_begin, seq_end = tl.load(ends + seq), tl.load(ends + seq + 1)
        length = tl.load(lens + seq)
        number = seq if table_rows is None else tl.load(table_rows + seq)
        queries = tl.load(q + seq * q_stride + heads[:, None] * DIM + dims[None, :], mask=wanted, other=0.0)
        to = tl.minimum(seq_end, stop)
        seen = tl.maximum(length - window, 0)
        begin, end = seen + (tile - seq_begin) * TOKENS, tl.minimum(seen + (to - seq_begin) * TOKENS, length)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        row = table + number.to(tl.int64) * table_stride
        ahead = begin + tl.arange(0, TOKENS)
        pages = tl.load(row + ahead // PAGE, mask=ahead < end, other=0)
        for start in tl.range(begin, end, TOKENS):
            places = start + tl.arange(0, TOKENS)
            inside = places < end
            slots = pages.to(tl.int64) * PAGE + places % PAGE
            offsets = slots[:, None] * (KV_HEADS * DIM) + (kv_head * DIM + dims)[None, :]
            ahead = places + TOKENS  # page ids a tile early: the loads of keys and values then depend on no other load
            pages = tl.load(row + ahead // PAGE, mask=ahead < end, other=0)
            there = inside[:, None] & (dims < DIM)[None, :]
            k = tl.load(keys + offsets, mask=there, other=0.0).to(queries.dtype)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp2(scores - new_best[:, None])
            fade = tl.exp2(best - new_best)
            sums = sums * fade + tl.sum(weights, 1)
            v = tl.load(values + offsets, mask=there, other=0.0).to(queries.dtype)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            best = new_best
        if v_scale is not None:
            acc *= tl.load(v_scale + kv_head)
        result = acc / tl.maximum(sums, 1e-30)[:, None]  # an empty sequence, padding, gets zeros
        place = out + (seq * KV_HEADS + kv_head) * GROUP * DIM
        opens = tile == seq_begin
        if opens & (to == seq_end):
            tl.store(place + rows[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty), mask=wanted)
        else:
            part = ((2 * run + opens.to(tl.int32)) * KV_HEADS + kv_head) * GROUP + rows
            tl.store(part_out + part[:, None] * DIM + dims[None, :], result, mask=wanted)
            tl.store(part_lse + part, best + tl.log2(sums), mask=rows < GROUP)
            opener, closer = _owner(seq_begin, total, runs), _owner(seq_end - 1, total, runs)
            count = arrived + opener * KV_HEADS + kv_head
            tl.debug_barrier()  # all threads' parts are written before one thread says so
            if tl.atomic_add(count, 1, sem="acq_rel") == closer - opener:
                tl.store(count, 0)
                _merge(part_out, part_lse, opener, closer, kv_head, place, KV_HEADS, GROUP, DIM, DIM_PAD)
        tile = to
        seq += 1


@triton.jit
def _merge(
    part_out, part_lse, opener, closer, kv_head, out,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Writes one KV head of a sequence from the parts of runs `opener` … `closer`, each by its share of the softmax."""
    LANES: tl.constexpr = triton.next_power_of_2(GROUP)
    BLOCK: tl.constexpr = max(32 // LANES, 1)
    rows, dims = tl.arange(0, LANES), tl.arange(0, DIM_PAD)
    best = tl.full([LANES], float("-inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    acc = tl.zeros([LANES, DIM_PAD], tl.float32)
    for base in range(opener, closer + 1, BLOCK):
        run = base + tl.arange(0, BLOCK)
        entry = ((2 * run + (run == opener).to(tl.int32)) * KV_HEADS + kv_head) * GROUP
        part = entry[:, None] + rows[None, :]
        there = (run <= closer)[:, None] & (rows < GROUP)[None, :]
        # not from the L1 cache, which knows nothing of other multiprocessors' writes
        lse = tl.load(part_lse + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        inside = there[:, :, None] & (dims < DIM)[None, None, :]
        values = tl.load(part_out + part[:, :, None] * DIM + dims, mask=inside, other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(lse, 0))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # rows that only fill up
        weights = tl.exp2(lse - shift[None, :])
        fade = tl.exp2(best - shift)
        sums = sums * fade + tl.sum(weights, 0)
        acc = acc * fade[:, None] + tl.sum(values * weights[:, :, None], 0)
        best = new_best
    merged = acc / tl.maximum(sums, 1e-30)[:, None]
    wanted = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    tl.store(out + rows[:, None] * DIM + dims[None, :], merged.to(out.dtype.element_ty), mask=wanted)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    table: Tensor,
    table_rows: Tensor | None,
    lens: Tensor,
    out: Tensor,
    scale: float,
    tile: Tile,
    schedule: Schedule,
    parts: Parts,
    pdl: bool = False,
) -> None:
    """Attention of one query a sequence, the last of its `lens` tokens.

    Args:
        q: [S, heads, head_dim], each row of heads contiguous.
        keys, values: a layer of the pool, [pages, page_size, kv_heads, head_dim].
        scales: factors on keys and on values, [kv_heads] float32; None: 1.
        table: [rows, P] int32 page ids, of which the first ceil(len / page_size) count.
        table_rows: [S] int32, each sequence's row of the table; None: its own number.
        lens: [S] int32.
        out: [S, heads, head_dim], contiguous; written.
        schedule: of `lens`, in tiles of `tile.tokens`; its window is the positions that a query sees.
        parts: scratch memory for as many runs as the schedule has.
    """
    num_seqs, heads, dim = q.shape
    _, page, kv_heads, _ = keys.shape
    group, runs = heads // kv_heads, len(schedule.first)
    assert runs <= len(parts.arrived)
    _decode[kv_heads, runs](
        q, q.stride(0), keys, values, *scales, table, table.stride(0), table_rows, lens, schedule.ends, schedule.first,
        out, parts.out, parts.lse, parts.arrived, scale * LOG2_E, num_seqs, schedule.window, runs,
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim,
        DIM_PAD=triton.next_power_of_2(max(dim, 16)), PAGE=page, TOKENS=tile.tokens, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
