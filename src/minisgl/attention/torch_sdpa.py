"""Attention with what PyTorch brings, on any device: gather the pages, then `scaled_dot_product_attention`.

The sequences of a step are cut into pieces that each take one call: decodes of similar length together, every
extending sequence by itself. The pieces and their masks are the same for all layers with the same window.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minisgl.attention.base import AttentionBackend, ForwardBatch


@dataclass(slots=True)
class Piece:
    """Queries that one call serves: n rows of each of B sequences, over pages gathered to B rows of L tokens."""

    rows: slice | Tensor  # of q; B × n of them
    pages: slice | Tensor  # B × pages, flat; a slice where one sequence's pages follow one another in the pool
    num_seqs: int
    length: int  # L
    mask: Tensor | None  # bool [B, 1, n, L]; None: all visible, or plainly causal
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Half:
    """A layer's keys, or its values."""

    pages: Tensor  # [pages, page_size, kv_heads, head_dim]
    scale: Tensor | None  # [kv_heads] float32: what they were divided by


@dataclass(slots=True)
class Plan:
    """What layers share: the page table on the host where it is there anyway, and pieces by window."""

    table: np.ndarray | None
    pieces: dict[int | None, list[Piece]] = field(default_factory=dict)


class TorchSDPA(AttentionBackend):
    """Eager attention for CPU and CUDA. In float32 it is exact to rounding."""

    name = "torch_sdpa"

    def prepare(self, batch: ForwardBatch) -> None:
        on_host = batch.page_table.device.type == "cpu"
        batch.plan = Plan(batch.page_table.numpy() if on_host else None)

    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        plan: Plan = batch.plan
        if window not in plan.pieces:
            plan.pieces[window] = _cut(batch, plan.table, window)
        pool = batch.pool
        k_scale, v_scale = pool.scales(layer)
        keys, values = Half(pool.k[layer], k_scale), Half(pool.v[layer], v_scale)
        pieces = plan.pieces[window]
        if len(pieces) == 1:
            return _attend(q, keys, values, pieces[0], scale)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for piece in pieces:
            out[piece.rows] = _attend(q[piece.rows], keys, values, piece, scale)
        return out


def _attend(q: Tensor, keys: Half, values: Half, piece: Piece, scale: float) -> Tensor:
    """`q` [B × n, heads, head_dim] → the same, contiguous."""
    heads, head_dim = q.shape[1:]
    k, v = _gather(keys, piece, q.dtype), _gather(values, piece, q.dtype)
    kv_heads = k.shape[1]
    if q.shape[0] == piece.num_seqs:  # one query each: a group's heads stand in for rows, no key is repeated
        q = q.reshape(piece.num_seqs, kv_heads, heads // kv_heads, head_dim)
        out = scaled_dot_product_attention(q, k, v, piece.mask, scale=scale)
        return out.reshape(-1, heads, head_dim).contiguous()
    q = q.view(piece.num_seqs, -1, heads, head_dim).transpose(1, 2)
    grouped = heads != kv_heads
    out = scaled_dot_product_attention(q, k, v, piece.mask, is_causal=piece.causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(-1, heads, head_dim).contiguous()


def _gather(half: Half, piece: Piece, dtype: torch.dtype) -> Tensor:
    """[B, kv_heads, L, head_dim], a view where the pages are a slice and not quantised."""
    pool = half.pages if half.scale is None else half.pages.view(torch.uint8)  # float8 has few operators
    pages = pool[piece.pages] if isinstance(piece.pages, slice) else pool.index_select(0, piece.pages)
    if half.scale is not None:
        pages = pages.view(half.pages.dtype).to(dtype) * half.scale.to(dtype)[:, None]
    tokens = pages.view(piece.num_seqs, -1, *pool.shape[2:])
    return tokens[:, : piece.length].transpose(1, 2)


# -- cutting a step into pieces ---------------------------------------------------------------------------------------


def _cut(batch: ForwardBatch, table: np.ndarray | None, window: int | None) -> list[Piece]:
    """Decodes by the power of two of their length, so that padding at most doubles it; then the extending ones."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(batch.seq_lens_host[: batch.num_decodes].tolist()):
        groups[length.bit_length()].append(i)
    pieces = [
        _decodes(batch, group, window) if len(group) > 1 else _sequence(batch, table, group[0], group[0], window)
        for group in groups.values()
    ]
    row = batch.num_decodes
    for i in range(batch.num_decodes, len(batch.seq_lens_host)):
        pieces.append(_sequence(batch, table, i, row, window))
        row += int(batch.query_lens_host[i])
    return pieces


def _first_page(position: int, window: int | None, page_size: int) -> int:
    """First page that the query at `position` sees into; later queries see no earlier one."""
    return 0 if window is None else max(0, position - window + 1) // page_size


def _mask(positions: Tensor, first: int, length: int, window: int | None) -> Tensor:
    """Which of the positions first … first + length - 1 the queries at `positions` [...] see: bool [..., length]."""
    keys = torch.arange(first, first + length, device=positions.device)
    positions = positions.unsqueeze(-1)
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)


def _decodes(batch: ForwardBatch, group: list[int], window: int | None) -> Piece:
    size, device = batch.pool.page_size, batch.page_table.device
    lens = batch.seq_lens_host[group]
    first = _first_page(int(lens.min()) - 1, window, size)
    last = -(-int(lens.max()) // size)
    rows = torch.tensor(group, device=device)
    pages = batch.page_table.index_select(0, rows)[:, first:last].reshape(-1)
    length = (last - first) * size
    positions = torch.tensor(lens - 1, device=device)
    mask = _mask(positions, first * size, length, window)[:, None, None]
    everyone = len(group) == batch.num_decodes
    return Piece(slice(0, len(group)) if everyone else rows, pages, len(group), length, mask)


def _sequence(batch: ForwardBatch, table: np.ndarray | None, i: int, row: int, window: int | None) -> Piece:
    size, device = batch.pool.page_size, batch.page_table.device
    total, count = int(batch.seq_lens_host[i]), int(batch.query_lens_host[i])
    first = _first_page(total - count, window, size)
    last = -(-total // size)
    length = total - first * size
    run = _as_slice(table[i, first:last]) if table is not None else None
    pages = batch.page_table[i, first:last] if run is None else run
    piece = Piece(slice(row, row + count), pages, 1, length, None)
    if window is not None and total > window:
        positions = torch.arange(total - count, total, device=device)
        piece.mask = _mask(positions, first * size, length, window)[None, None]
    elif count == total:
        piece.causal = count > 1
    elif count > 1:
        piece.mask = _mask(torch.arange(total - count, total, device=device), 0, total, None)[None, None]
    return piece


def _as_slice(pages: np.ndarray) -> slice | None:
    """The slice that `pages` make up, if each follows the one before."""
    start, stop = int(pages[0]), int(pages[-1]) + 1
    return slice(start, stop) if stop - start == len(pages) and bool((np.diff(pages) == 1).all()) else None
