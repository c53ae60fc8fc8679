"""The Triton attention backend: one kernel for a step's decodes, one for the sequences that extend.

Neither asks the device for anything: what a step shares over its layers follows from the shapes of its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.attention.triton_decode import LONG, Parts, Splits, decode, rank
from minisgl.attention.triton_prefill import prefill
from minisgl.attention.triton_tiles import decode_tile, many_short, prefill_tile
from minisgl.kernels.triton_start import spare_hash
from minisgl.types import ConfigError

SMS_UNKNOWN = 128  # multiprocessors, where there's no GPU to ask: the interpreter


@dataclass(frozen=True, slots=True)
class Plan:
    """The two parts of a step, decodes and extending sequences, as views of the batch's tensors."""

    splits: Splits | None  # None: no decodes
    pdl: bool  # programmatic dependent launch
    shared_bytes: int  # that a program can have
    tables: tuple[Tensor, Tensor]
    table_rows: Tensor  # of the decodes
    order: Tensor | None  # of the decodes, where the longest are to begin first
    lens: tuple[Tensor, Tensor]
    starts: Tensor  # of the extending sequences
    num_extend_tokens: int
    short: bool  # many short prompts


class TritonPaged(AttentionBackend):
    """Attention on NVIDIA GPUs, in any mix of decodes and extending sequences; safe to capture in a CUDA graph.

    Args:
        splits: fixes how decodes are split, as far as scratch memory allows; None: by the batch.

    Raises:
        ConfigError: there is no GPU for the kernels, and Triton's interpreter is off.
    """

    name = "triton"
    capturable = captures_prompts = True
    short_context = LONG

    def __init__(self, splits: Splits | None = None) -> None:
        if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
            raise ConfigError("attention triton needs an NVIDIA GPU that torch can use; use --attention torch_sdpa")
        spare_hash()
        self.splits = splits
        self._numbers: dict[torch.device, Tensor] = {}
        self._parts: dict[tuple[torch.device, int, int], Parts] = {}

    def prepare(self, batch: ForwardBatch) -> None:
        n, table, rows, splits, order = batch.num_decodes, batch.page_table, batch.table_rows, None, None
        extending, tokens = batch.seq_lens.shape[0] > n, batch.input_ids.shape[0] - n
        gpu = torch.cuda.get_device_properties(table.device) if table.is_cuda else None
        if n and self.splits:
            splits = self.splits.within(n * batch.pool.num_kv_heads)
        elif n:
            sms = gpu.multi_processor_count if gpu else SMS_UNKNOWN
            longest = table.shape[1] * batch.pool.page_size
            splits = Splits.choose(n, batch.pool.num_kv_heads, longest, sms)
            order = rank(batch.seq_lens[:n]) if n * batch.pool.num_kv_heads > 2 * sms else None
        batch.plan = Plan(
            splits,
            gpu is not None and gpu.major >= 9,
            getattr(gpu, "shared_memory_per_block_optin", 0),
            (table, table[n:] if rows is None or not extending else table.index_select(0, rows[n:])),
            self._own_rows(n, table.device) if rows is None else rows,
            order,
            (batch.seq_lens[:n], batch.seq_lens[n:]),
            batch.query_starts[n:],
            tokens,
            not batch.pool.quantised and many_short(tokens, batch.seq_lens_host[n:]),
        )

    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        plan: Plan = batch.plan
        n, dim = batch.num_decodes, q.shape[2]
        if q.stride(2) != 1 or q.stride(1) != dim:
            q = q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        pool = batch.pool.k[layer], batch.pool.v[layer], batch.pool.scales(layer)
        dim_pad = triton.next_power_of_2(dim)
        if plan.splits is not None:
            parts = self._scratch(q, batch.pool.num_kv_heads)
            tile = decode_tile(dim_pad, q.dtype, pool[0].dtype, plan.splits.most > 1)
            table, rows, order, lens = plan.tables[0], plan.table_rows, plan.order, plan.lens[0]
            decode(q[:n], *pool, table, rows, order, lens, out[:n], scale, window, tile, plan.splits, parts, plan.pdl)
        if plan.num_extend_tokens:
            tile, tokens = prefill_tile(dim_pad, q.dtype, plan.shared_bytes, plan.short), plan.num_extend_tokens
            prefill(q, *pool, plan.tables[1], plan.lens[1], plan.starts, tokens, out, scale, window, tile)
        return out

    def _own_rows(self, count: int, device: torch.device) -> Tensor:
        """0 … count: steps outside of graphs then run the kernels that graphs compiled."""
        known = self._numbers.get(device)
        if known is None or len(known) < count:
            size = triton.next_power_of_2(max(count, 256))
            known = self._numbers[device] = torch.arange(size, dtype=torch.int32, device=device)
        return known[:count]

    def _scratch(self, q: Tensor, num_kv_heads: int) -> Parts:
        """Allocated once: captured graphs hold its address."""
        group, dim = q.shape[1] // num_kv_heads, q.shape[2]
        key = q.device, group, dim
        if key not in self._parts:
            self._parts[key] = Parts.allocate(group, dim, q.device)
        return self._parts[key]
