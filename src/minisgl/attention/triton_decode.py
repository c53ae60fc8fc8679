"""Decode attention over the paged pool in Triton: one query token a sequence.

It is bound by memory: each key and each value is read once. A program takes one KV head of one sequence, and the query
heads that share it are the rows of its matrix products. Where there are too few sequences to fill the GPU, a sequence
is split over several programs (flash-decoding: Dao and others, 2023), and a second kernel weighs their parts. Where
there are more sequences than that, the longest begin first (`rank`): what is left to the end is short, so that no
multiprocessor works on alone while the others wait.

The grid and every argument follow from the batch's size and the page table's width, lengths are read on the device: a
captured graph stays right while sequences grow.

Programmatic dependent launch: both kernels wait before they read what another kernel wrote, and let the next one
start right after, to wait in turn.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.attention.triton_tiles import Tile
from minisgl.cache.pool import FP8

LOG2_E = 1.4426950408889634  # scores become powers of two
OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
LONG = 4096  # tokens that one program may read while others wait for it
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MAX_PROGRAMS = 4096  # with splits; more that find nothing to do would cost more than the splits gain


@dataclass(frozen=True, slots=True)
class Splits:
    """How sequences are cut: into parts of at least `chunk` tokens, and into `most` parts at most."""

    chunk: int
    most: int

    @staticmethod
    def choose(num_seqs: int, num_kv_heads: int, max_len: int, num_sms: int) -> Splits:
        """Two programs a multiprocessor keep the memory busy: splits make up for sequences that are missing.

        Beyond that only long sequences are split, and only where `max_len` allows for such: the second kernel costs
        two microseconds, and so may programs without work.
        """
        programs = num_seqs * num_kv_heads
        fill, even = round(2 * num_sms / programs), -(-max_len // LONG)
        chunk = 32 if fill > 1 else LONG // 4
        return Splits(chunk, min(max(fill, even), -(-max_len // chunk))).within(programs)

    def within(self, programs: int) -> Splits:
        """As many parts of each as there is scratch memory for, if there are `programs` without splits."""
        return Splits(self.chunk, max(1, min(self.most, MAX_PROGRAMS // programs)))


@dataclass(frozen=True, slots=True)
class Parts:
    """Where splits leave what they computed: one entry a program."""

    out: Tensor  # [MAX_PROGRAMS, group, head_dim] float32
    lse: Tensor  # [MAX_PROGRAMS, group] float32: log2 of the sum of 2^score

    @staticmethod
    def allocate(group: int, head_dim: int, device: torch.device) -> Parts:
        out = torch.empty(MAX_PROGRAMS, group, head_dim, device=device)
        return Parts(out, torch.empty(out.shape[:2], device=device))


# Integers and views that change from step to step must not each bring a compilation of their own.
KEPT_GENERAL = {
    "do_not_specialize": ["table_stride", "num_seqs", "window", "chunk", "most"],
    "do_not_specialize_on_alignment": ["table", "table_rows", "order", "lens", "starts", "k_scale", "v_scale"],
}


@triton.jit(**KEPT_GENERAL)
def _rank(lens, order, num_seqs, SEQS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(lens + i, mask=i < num_seqs, other=0)[:, None]
    before = tl.zeros([BLOCK], tl.int32)
    for base in range(0, num_seqs, SEQS):
        j = base + tl.arange(0, SEQS)
        other = tl.load(lens + j, mask=j < num_seqs, other=-1)[None, :]
        goes_first = (other > own) | ((other == own) & (j[None, :] < i[:, None]))
        before += tl.sum(goes_first.to(tl.int32), 1)
    tl.store(order + before, i, mask=i < num_seqs)


def rank(lens: Tensor) -> Tensor:
    """Numbers of the sequences from the longest to the shortest, [S] int32, of `lens` [S] int32; on the device."""
    order = torch.empty_like(lens)
    _rank[triton.cdiv(len(lens), 16),](lens, order, len(lens), SEQS=128, BLOCK=16)
    return order


@triton.jit
def _halves(words, OPERAND: tl.constexpr):
    """The e4m3 in the low and in the high bytes of `words`, int16.

    Bytes in shared memory can't be transposed on their way into registers (ldmatrix moves 16 bits); words can.
    """
    if INTERPRETED:
        low, high = (words & 0xFF).to(tl.uint8), ((words >> 8) & 0xFF).to(tl.uint8)
        low, high = low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
    else:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $2, $2, 0x3120; mov.b32 {a, b}, t;
            cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }""",
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return low.to(OPERAND), high.to(OPERAND)


@triton.jit(**KEPT_GENERAL)
def _decode(
    q, q_stride, keys, values, k_scale, v_scale, table, table_stride, table_rows, order, lens, out, part_out, part_lse,
    scale, window, chunk, most, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
    OPERAND: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    kv_head, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if order is not None:
        seq = tl.load(order + seq)
    length = tl.load(lens + seq)
    first, span = _span(length, window, chunk, most, TOKENS)
    begin = first + split * span
    end = tl.minimum(begin + span, length)
    if (split > 0) & (begin >= length):
        return
    STRIDE: tl.constexpr = KV_HEADS * DIM // PACK  # from token to token, in elements or words
    rows, columns = tl.arange(0, ROWS), tl.arange(0, DIM_PAD // PACK)[None, :]
    wanted = (rows < GROUP)[:, None] & (columns < DIM // PACK)
    own = q + seq * q_stride + (kv_head * GROUP + rows)[:, None] * DIM + columns * PACK
    queries = tl.load(own, mask=wanted, other=0.0).to(OPERAND)
    queries_high = tl.load(own + 1, mask=wanted, other=0.0).to(OPERAND) if PACK == 2 else queries

    if k_scale is not None:
        scale *= tl.load(k_scale + kv_head)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, TOKENS], tl.float32)  # summed up at the end: one exchange between warps less
    acc = tl.zeros([ROWS, DIM_PAD // PACK], tl.float32)
    acc_high = acc
    row = table + tl.load(table_rows + seq).to(tl.int64) * table_stride
    keys, values = keys + kv_head * (DIM // PACK), values + kv_head * (DIM // PACK)
    tile = tl.arange(0, TOKENS)
    ahead = (begin + tile).to(tl.uint32)
    pages = tl.load(row + ahead // PAGE, mask=ahead < end, other=0)
    for start in tl.range(begin, end, TOKENS):
        places = (start + tile).to(tl.uint32)  # unsigned: a shift divides them by the page's size
        inside = places < end
        offsets = (pages.to(tl.int64) * (PAGE * STRIDE) + places % PAGE * STRIDE)[:, None] + columns
        ahead = places + TOKENS  # page ids a tile early: the loads of keys and values then depend on no other load
        pages = tl.load(row + ahead // PAGE, mask=ahead < end, other=0)
        seen = inside[:, None] & (columns < DIM // PACK)
        k = tl.load(keys + offsets, mask=seen, other=0)
        k, k_high = _halves(k, OPERAND) if PACK == 2 else (k, k)
        scores = tl.dot(queries, tl.trans(k.to(OPERAND)), input_precision="ieee")
        scores = tl.dot(queries_high, tl.trans(k_high), scores, input_precision="ieee") if PACK == 2 else scores
        scores = tl.where(inside[None, :], scores * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)[:, None]
        total = total * fade + weights
        best = new_best
        v = tl.load(values + offsets, mask=seen, other=0)
        v, v_high = _halves(v, OPERAND) if PACK == 2 else (v, v)
        acc = tl.dot(weights.to(OPERAND), v.to(OPERAND), acc * fade, input_precision="ieee")
        if PACK == 2:
            acc_high = tl.dot(weights.to(OPERAND), v_high, acc_high * fade, input_precision="ieee")

    total = tl.sum(total, 1)
    acc = tl.interleave(acc, acc_high) if PACK == 2 else acc
    if v_scale is not None:
        acc *= tl.load(v_scale + kv_head)
    result = acc / tl.maximum(total, 1e-30)[:, None]  # an empty sequence, padding, gets zeros
    dims, heads = tl.arange(0, DIM_PAD), kv_head * GROUP + rows
    wanted = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    places = (seq * KV_HEADS * GROUP + heads)[:, None] * DIM + dims[None, :]
    if not SPLIT:
        tl.store(out + places, result.to(out.dtype.element_ty), mask=wanted)
    else:
        used = tl.cdiv(length - first, span)
        if used <= 1:
            tl.store(out + places, result.to(out.dtype.element_ty), mask=wanted)
        else:
            base = (seq * KV_HEADS + kv_head) * most
            part = (base + split) * GROUP + rows
            tl.store(part_out + part[:, None] * DIM + dims[None, :], result, mask=wanted)
            tl.store(part_lse + part, best + tl.log2(total), mask=rows < GROUP)


@triton.jit
def _span(length, window, chunk, most, TOKENS: tl.constexpr):
    """The first position that is seen, and the tokens of a split."""
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, most), TOKENS) * TOKENS
    return first, tl.maximum(share, chunk)


@triton.jit(**KEPT_GENERAL)
def _combine(
    lens, out, part_out, part_lse, window, chunk, most,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence) brings the parts of a split sequence together. Launched right behind `_decode`.

    Each part is weighed by its share of the softmax's sum.
    """
    BLOCK: tl.constexpr = 32
    head, seq = tl.program_id(0), tl.program_id(1)
    length = tl.load(lens + seq)  # before the wait: _decode waited for the kernels before it, so this is there
    first, span = _span(length, window, chunk, most, TOKENS)
    used = tl.cdiv(length - first, span)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if used <= 1:
        return
    base = (seq * KV_HEADS + head // GROUP) * most
    dims = tl.arange(0, DIM_PAD)
    best, total = float("-inf"), 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, used, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < used
        part = (base + i) * GROUP + head % GROUP
        lse = tl.load(part_lse + part, mask=inside, other=float("-inf"))
        seen = inside[:, None] & (dims < DIM)[None, :]
        values = tl.load(part_out + part[:, None] * DIM + dims[None, :], mask=seen, other=0.0)
        new_best = tl.maximum(best, tl.max(lse, 0))
        weights = tl.exp2(lse - new_best)
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(values * weights[:, None], 0)
        best = new_best
    place = out + (seq * KV_HEADS * GROUP + head) * DIM + dims
    tl.store(place, (acc / total).to(out.dtype.element_ty), mask=dims < DIM)


def decode(
    q: Tensor, keys: Tensor, values: Tensor, scales: tuple[Tensor | None, Tensor | None], table: Tensor,
    table_rows: Tensor, order: Tensor | None, lens: Tensor, out: Tensor, scale: float, window: int | None, tile: Tile,
    splits: Splits, parts: Parts, pdl: bool = False,
) -> None:  # fmt: skip
    """Attention of one query a sequence, the last of its `lens` tokens.

    Args:
        q: [S, heads, head_dim], each row of heads contiguous.
        keys, values: a layer of the pool, [pages, page_size, kv_heads, head_dim].
        scales: factors on keys and on values, [kv_heads] float32; None: 1.
        table: [rows, P] int32 page ids, of which the first ceil(len / page_size) count.
        table_rows: [S] int32, each sequence's row of the table.
        order: [S] int32, the sequences in the order in which to begin; None: as they are.
        lens: [S] int32.
        out: [S, heads, head_dim], contiguous; written.
        window: positions that a query sees, its own among them; None: all.
        parts: scratch memory; used where `splits.most` > 1.
    """
    num_seqs, heads, dim = q.shape
    _, page, kv_heads, _ = keys.shape
    pack = 2 if keys.dtype == FP8 else 1
    keys, values = (keys.view(torch.int16), values.view(torch.int16)) if pack == 2 else (keys, values)
    group, dim_pad = heads // kv_heads, triton.next_power_of_2(max(dim, 16 * pack))
    assert splits.most == 1 or num_seqs * kv_heads * splits.most <= MAX_PROGRAMS
    window = 2**31 - 1 if window is None else window
    # e4m3 becomes float16 in one instruction, bfloat16 in three, and fits into either
    operand = q.dtype if pack == 1 or q.dtype == torch.float32 else torch.float16
    launch = {"num_warps": tile.warps, "num_stages": tile.stages, **({"launch_pdl": True} if pdl else {})}
    _decode[kv_heads, num_seqs, splits.most](
        q, q.stride(0), keys, values, *scales, table, table.stride(0), table_rows, order, lens, out, parts.out,
        parts.lse, scale * LOG2_E, window, splits.chunk, splits.most,
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim, DIM_PAD=dim_pad,
        PAGE=page, TOKENS=tile.tokens, SPLIT=splits.most > 1, PDL=pdl, OPERAND=OPERANDS[operand],
        PACK=pack, **launch,
    )  # fmt: skip
    if splits.most > 1:
        _combine[heads, num_seqs](
            lens, out, parts.out, parts.lse, window, splits.chunk, splits.most,
            KV_HEADS=kv_heads, GROUP=group, DIM=dim, DIM_PAD=dim_pad, TOKENS=tile.tokens, PDL=pdl,
            num_warps=4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
