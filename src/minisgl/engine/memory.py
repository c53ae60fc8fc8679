"""How many KV pages the device has room for."""

from __future__ import annotations

import logging

import torch

from minisgl.config import EngineConfig
from minisgl.engine.budget import Budget
from minisgl.hardware import available_memory
from minisgl.models.config import ModelConfig
from minisgl.types import ConfigError

log = logging.getLogger(__name__)

CPU_POOL_BYTES = 512 << 20  # enough for a handful of chats, little enough for a laptop
MIB = 1 << 20


def _activation_bytes(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """A generous guess of what one step allocates: a few tensors of each width, and logits in fp32 four times.

    Ranks share the inner widths. Not the logits: where filters need it, each has those of the whole vocabulary.
    """
    assert config.max_batched_tokens is not None and config.max_running is not None
    inner = model.intermediate_size + model.num_heads * model.head_dim
    width = 6 * model.hidden_size + 4 * inner // config.tp_size
    return config.max_batched_tokens * width * dtype.itemsize + 16 * config.max_running * model.vocab_size


def choose_num_pages(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, page: int, context: int, budget: Budget | None = None
) -> int:
    """Pages of the KV pool: what was asked for, or what memory allows once the weights are loaded.

    Args:
        dtype: of activations. page: bytes of one. budget: of a GPU.

    Raises:
        ConfigError: not even one page fits; the message names what to lower.
    """
    if config.num_pages is not None:
        return config.num_pages
    reserve = _activation_bytes(config, model, dtype)
    if budget is not None:
        room, reserve = budget.room(config.mem_fraction), budget.activations + budget.graphs
        free = room + reserve
    else:
        free = (available_memory() or 4 * CPU_POOL_BYTES) // config.tp_size  # the ranks share it
        room = min(int(free * config.mem_fraction) - reserve, CPU_POOL_BYTES // config.tp_size)
    num_pages = room // page - 1  # and the dummy page
    if num_pages < 1:
        raise ConfigError(
            f"no memory for a KV pool: {free // MIB} MiB are free, a step needs {reserve // MIB} MiB and a page "
            f"{page / MIB:.2f} MiB; lower --max-batched-tokens or --max-running, or raise --mem-fraction"
        )
    num_pages = min(num_pages, (config.max_running or 1) * -(-context // config.page_size))
    if budget is not None:
        log.info("the GPU's memory:\n%s", budget.table((num_pages + 1) * page, num_pages * config.page_size))
    log.info("KV pool: %d pages of %d tokens, %d MiB", num_pages, config.page_size, num_pages * page // MIB)
    return int(num_pages)
