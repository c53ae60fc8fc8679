"""The Triton attention backend: one kernel for a step's decodes, one for the sequences that extend.

Neither asks the device for anything: what a step shares over its layers follows from the shapes of its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.attention.triton_decode import Parts, Schedule, decode
from minisgl.attention.triton_prefill import prefill
from minisgl.attention.triton_tiles import Tile, decode_tile, prefill_tile
from minisgl.cache.pool import KVPool
from minisgl.types import ConfigError

PROGRAMS_UNKNOWN = 12  # where there is no GPU to ask: the interpreter
MOST_RESIDENT = 8  # programs a multiprocessor: more than that don't make it faster


@dataclass(frozen=True, slots=True)
class Plan:
    """The two parts of a step, decodes and extending sequences, as views of the batch's tensors."""

    num_decodes: int
    pdl: bool  # programmatic dependent launch
    shared_bytes: int  # that a program can have
    tables: tuple[Tensor, Tensor]
    table_rows: Tensor | None  # of the decodes, if not their own numbers
    lens: tuple[Tensor, Tensor]
    starts: Tensor  # of the extending sequences
    num_extend_tokens: int
    schedules: dict[int | None, Schedule] = field(default_factory=dict)  # of the decodes, by window


class TritonPaged(AttentionBackend):
    """Attention on NVIDIA GPUs, in any mix of decodes and extending sequences; safe to capture in a CUDA graph.

    Args:
        runs: programs a KV head for a step's decodes; None: as many as the GPU holds at a time.

    Raises:
        ConfigError: there is no GPU for the kernels, and Triton's interpreter is off.
    """

    name = "triton"
    capturable = True

    def __init__(self, runs: int | None = None) -> None:
        if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
            raise ConfigError("attention triton needs an NVIDIA GPU that torch can use; use --attention torch_sdpa")
        self.runs = runs
        self._parts: dict[tuple[torch.device, int, int, int], Parts] = {}

    def prepare(self, batch: ForwardBatch) -> None:
        n, table = batch.num_decodes, batch.page_table
        gpu = torch.cuda.get_device_properties(table.device) if table.is_cuda else None
        batch.plan = Plan(
            n,
            gpu is not None and gpu.major >= 9,
            getattr(gpu, "shared_memory_per_block_optin", 0),
            (table[:n] if batch.table_rows is None else table, table[n:]),
            batch.table_rows,
            (batch.seq_lens[:n], batch.seq_lens[n:]),
            batch.query_starts[n:],
            batch.input_ids.shape[0] - n,
        )

    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        plan: Plan = batch.plan
        n, dim = batch.num_decodes, q.shape[2]
        if q.stride(2) != 1 or q.stride(1) != dim:
            q = q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        pool = batch.pool.k[layer], batch.pool.v[layer], batch.pool.scales(layer)
        dim_pad = triton.next_power_of_2(dim)
        if plan.num_decodes:
            tile = decode_tile(dim_pad, q.dtype)
            parts = self._scratch(q, batch.pool, tile)
            if window not in plan.schedules:
                plan.schedules[window] = Schedule.make(plan.lens[0], window, tile, len(parts.arrived))
            table, rows, lens = plan.tables[0], plan.table_rows, plan.lens[0]
            decode(q[:n], *pool, table, rows, lens, out[:n], scale, tile, plan.schedules[window], parts, plan.pdl)
        if plan.num_extend_tokens:
            tile, tokens = prefill_tile(dim_pad, q.dtype, plan.shared_bytes), plan.num_extend_tokens
            prefill(q, *pool, plan.tables[1], plan.lens[1], plan.starts, tokens, out, scale, window, tile)
        return out

    def _scratch(self, q: Tensor, pool: KVPool, tile: Tile) -> Parts:
        """Allocated once: captured graphs hold its address."""
        heads, group, dim = pool.num_kv_heads, q.shape[1] // pool.num_kv_heads, q.shape[2]
        key = q.device, heads, group, dim
        if key not in self._parts:
            runs = self.runs or max(programs(tile, dim, pool.k.element_size(), q.device) // heads, 1)
            self._parts[key] = Parts.allocate(runs, heads, group, dim, q.device)
        return self._parts[key]


def programs(tile: Tile, dim: int, element_bytes: int, device: torch.device) -> int:
    """Decode programs that a GPU holds at a time, by the shared memory that their tiles on the way take."""
    if device.type != "cuda":
        return PROGRAMS_UNKNOWN
    gpu = torch.cuda.get_device_properties(device)
    each = 2 * tile.tokens * triton.next_power_of_2(dim) * element_bytes * tile.stages
    resident = max(1, min(gpu.shared_memory_per_multiprocessor // each, MOST_RESIDENT))
    return int(gpu.multi_processor_count * resident)
