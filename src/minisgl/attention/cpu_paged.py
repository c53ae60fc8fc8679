"""Attention over the paged pool in C++ (csrc/cpu), for float32 on the CPU: one call a layer, whatever the lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.kernels.cpu import paged_attention
from minisgl.types import ConfigError


class CpuPaged(AttentionBackend):
    """Exact to rounding. Models whose layers run in C++ as a whole (models/cpu.py) don't ask it."""

    name = "cpu"

    def prepare(self, batch: ForwardBatch) -> None:
        if batch.pool.k.device.type != "cpu" or batch.pool.k.dtype != torch.float32:
            raise ConfigError("attention cpu needs device cpu and dtype float32; use torch_sdpa with others")

    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        pool = batch.pool
        paging = batch.page_table, batch.seq_lens, batch.query_starts
        return paged_attention(q, pool.k[layer], pool.v[layer], *paging, scale, window)
