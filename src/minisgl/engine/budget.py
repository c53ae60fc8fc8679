"""What a GPU's memory goes to: measured at start, before the KV pool takes the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.config import EngineConfig
from minisgl.engine.graphs import DecodeGraphs
from minisgl.engine.state import DeviceRows
from minisgl.models.decoder import CausalLM
from minisgl.types import ConfigError


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of one GPU's memory."""

    total: int
    others: int  # other processes, and CUDA's own
    weights: int
    activations: int  # of the largest step
    graphs: int

    def room(self, fraction: float) -> int:
        """For the KV pool, if `fraction` of the memory may be taken."""
        return int(self.total * fraction) - self.others - self.weights - self.activations - self.graphs

    def table(self, pool_bytes: int, num_tokens: int) -> str:
        parts = {name: getattr(self, name) for name in ("others", "weights", "activations", "graphs")}
        parts[f"KV pool of {num_tokens:,} tokens"] = pool_bytes
        parts["left"] = self.total - sum(parts.values())
        return "\n".join(f"{size / 1e9:10.2f} GB  {name}" for name, size in ({"in all": self.total} | parts).items())


@contextmanager
def explained() -> Iterator[None]:
    """Around an engine's start: says what to lower when a GPU's memory runs out.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        lower = "lower --mem-fraction, --max-batched-tokens, --max-running or --max-model-len"
        raise ConfigError(f"the GPU's memory ran out at start; {lower}. {str(e).splitlines()[0]}") from e


def largest_prefill(config: EngineConfig, context: int, pool: KVPool, attention: AttentionBackend) -> ForwardBatch:
    """As many tokens as a step may have, in sequences as long as they may be, all of them on page 0."""
    assert config.max_batched_tokens is not None and config.max_running is not None
    length, device = min(context, config.max_batched_tokens), pool.k.device
    counts = np.full(-(-config.max_batched_tokens // length), length, np.int32)
    counts[-1] -= counts.sum() - config.max_batched_tokens
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    positions = np.arange(starts[-1], dtype=np.int32) - np.repeat(starts[:-1], counts)
    lens, ends, place = (torch.from_numpy(x).to(device) for x in (counts, starts, positions))
    table = torch.zeros(len(counts), -(-length // pool.page_size), dtype=torch.int32, device=device)
    wanted = torch.arange(min(config.max_running, len(positions)), device=device)
    ids, slots = torch.zeros_like(place), torch.zeros_like(place, dtype=torch.int64)
    return ForwardBatch(ids, place, slots, table, lens, ends, wanted, 0, counts, counts, pool, attention)


@torch.inference_mode()
def _activations(model: CausalLM, batch: ForwardBatch) -> int:
    """Bytes that the step takes from the GPU, with two copies of its logits in float32 for what edits them."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    batch.attention.prepare(batch)
    logits = model.forward(batch)
    [logits.float().clone() for _ in range(2)]
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before


def _free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _graphs(model: CausalLM, pool: KVPool, attention: AttentionBackend, rows: DeviceRows, sizes: list[int]) -> int:
    """Bytes that CUDA graphs of `sizes` will take: the largest sets their shared memory, each has some of its own."""
    costs = []
    for some in (sizes[-1:], sorted({sizes[0], sizes[-1]})):
        before = _free()
        graphs = DecodeGraphs(model, pool, attention, rows, some, progress=False)
        costs.append(before - _free())
        del graphs
    return costs[0] + max(costs[1] - costs[0], 0) * (len(sizes) - 1)


def measure(
    model: CausalLM, pool: KVPool, attention: AttentionBackend, config: EngineConfig, context: int, sizes: list[int]
) -> Budget:
    """The budget of a GPU that holds the weights and, for trial steps, a `pool` of a page; `sizes` will have graphs."""
    assert config.max_running is not None
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_reserved()
    activations = _activations(model, largest_prefill(config, context, pool, attention))
    rows = DeviceRows(config.max_running, -(-context // pool.page_size), pool.dummy_page, pool.k.device)
    graphs = _graphs(model, pool, attention, rows, sizes) if sizes else 0
    free, total = _free(), torch.cuda.mem_get_info()[1]
    return Budget(total, total - free - torch.cuda.memory_reserved(), weights, activations, graphs)
