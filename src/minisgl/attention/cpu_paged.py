"""Attention over the paged pool in C++ (csrc/cpu), for float32 on the CPU: one call a layer, whatever the lengths."""

from __future__ import annotations

from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.kernels.cpu import paged_attention


class CpuPaged(AttentionBackend):
    """Exact to rounding. Models whose layers run in C++ as a whole (models/cpu.py) don't ask it."""

    name = "cpu"

    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        pool = batch.pool
        paging = batch.page_table, batch.seq_lens, batch.query_starts
        return paged_attention(q, pool.k[layer], pool.v[layer], *paging, scale, window)
