"""What a rank holds: over how many ranks a model can be split, and which token ids are whose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.models.config import ModelConfig
from minisgl.types import ConfigError

ALIGN = 8  # rows of a vocabulary range: 16 bytes of half precision, and a multiple of the 4 ids that share a draw


def _obstacles(config: ModelConfig, size: int) -> Iterator[str]:
    """Why the model can't be split over `size` ranks."""
    kv, moe = config.num_kv_heads, config.moe
    units = [(config.num_heads, "attention heads")]
    if moe is None or moe.dense_layers:
        units.append((config.intermediate_size, "columns of the MLP"))
    if moe is not None:
        units.append((moe.intermediate_size, "columns of an expert"))
    yield from (f"{total} {what} don't divide by {size}" for total, what in units if total % size)
    if kv % size and size % kv:
        yield f"{kv} key-value heads can be neither dealt out to {size} ranks nor shared by an equal number of them"


def allowed_tp_sizes(config: ModelConfig) -> list[int]:
    """The numbers of ranks over which the model can be split: each holds whole heads and an equal share of the MLPs."""
    return [n for n in range(1, config.num_heads + 1) if not any(_obstacles(config, n))]


def check_tp_size(config: ModelConfig, size: int) -> None:
    """
    Raises:
        ConfigError: the model can't be split over `size` ranks; it says why, and what works.
    """
    if reasons := list(_obstacles(config, size)):
        works = ", ".join(map(str, allowed_tp_sizes(config)))
        raise ConfigError(f"this model can't be split over {size} ranks: {'; '.join(reasons)}. --tp can be: {works}")


@dataclass(frozen=True, slots=True)
class VocabRange:
    """The token ids of one rank: `size` of them from `start` on.

    All ranks have `rows` rows of embedding, head and logits; on the last ones some of them, or all, stand for no id.
    """

    vocab_size: int
    tp: TPGroup = TPGroup()

    @property
    def rows(self) -> int:
        size = self.tp.size
        return self.vocab_size if size == 1 else -(-self.vocab_size // (size * ALIGN)) * ALIGN

    @property
    def start(self) -> int:
        return self.tp.rank * self.rows

    @property
    def size(self) -> int:
        return max(0, min(self.rows, self.vocab_size - self.start))

    @property
    def whole(self) -> bool:
        """Whether one rank holds them all."""
        return self.tp.size == 1

    def local(self, ids: Tensor) -> Tensor:
        """Places of `ids` among the rows; `rows`, one beyond the last, for those of other ranks."""
        if self.whole:
            return ids
        place = ids - self.start
        return torch.where((place >= 0) & (place < self.rows), place, self.rows)
