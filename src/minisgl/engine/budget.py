"""What a GPU's memory goes to: measured at start, before the KV pool takes the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.config import EngineConfig
from minisgl.engine.graphs import DecodeGraphs
from minisgl.engine.prompt_graphs import PromptGraphs, decode_sizes
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.engine.state import DeviceRows, upload
from minisgl.engine.steps import StepInputs, StepShape, forward_batch, lay_out
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


def largest_prefill(
    config: EngineConfig, context: int, pool: KVPool, attention: AttentionBackend, rows: DeviceRows
) -> ForwardBatch:
    """As many tokens as a step may have, in sequences as long as they may be, all of them on the dummy page."""
    assert config.max_batched_tokens is not None and config.max_running is not None
    most, length = config.max_batched_tokens, min(context, config.max_batched_tokens)
    host, _ = lay_out(ScheduledBatch(0), StepShape(most, 0, -(-most // length)), rows.dummy, length)
    inputs = StepInputs(*upload(pool.k.device, *host))
    wanted = torch.arange(min(config.max_running, most), device=pool.k.device)
    return forward_batch(inputs, 0, rows, pool, attention, wanted, host)


@torch.inference_mode()
def _activations(model: CausalLM, batch: ForwardBatch) -> int:
    """Bytes that the step takes from the GPU, with two copies of its logits in float32 for what edits them."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    logits = model.forward(batch)
    [logits.float().clone() for _ in range(2)]
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before


def _free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _graphs(
    model: CausalLM, pool: KVPool, attention: AttentionBackend, rows: DeviceRows, sizes: list[int], prompts: list[int]
) -> int:
    """Bytes that CUDA graphs will take: the largest set their shared memory, each has some of its own.

    Of those of steps with prompts it counts half: hardly any workload needs them all.
    """
    memory, parts, before = torch.cuda.graph_pool_handle(), (model, pool, attention, rows), _free()
    held: list[object] = [PromptGraphs(*parts, prompts, sizes[-1], memory)] if prompts else []
    left = []
    for some in (sizes[-1:], sizes[:1]):
        held.append(DecodeGraphs(*parts, some, False, memory))
        left.append(_free())
    others = len(sizes) - 1 + len(prompts) * len(decode_sizes(sizes[-1])) // 2
    return before - left[0] + max(left[0] - left[1], 0) * others


def measure(
    model: CausalLM, pool: KVPool, attention: AttentionBackend, config: EngineConfig, context: int, sizes: list[int],
    prompts: list[int],
) -> Budget:  # fmt: skip
    """The budget of a GPU that holds the weights and, for trial steps, a `pool` of a page.

    sizes, prompts: of steps that will have graphs, see `ModelRunner.capture`.
    """
    assert config.max_running is not None
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_reserved()
    rows = DeviceRows(config.max_running, -(-context // pool.page_size), pool.dummy_page, pool.k.device)
    activations = _activations(model, largest_prefill(config, context, pool, attention, rows))
    graphs = _graphs(model, pool, attention, rows, sizes, prompts) if sizes else 0
    free, total = _free(), torch.cuda.mem_get_info()[1]
    return Budget(total, total - free - torch.cuda.memory_reserved(), weights, activations, graphs)
