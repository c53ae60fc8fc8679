"""`TPGroup`: what a layer or the loader asks of the other ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.types import ConfigError


@dataclass(frozen=True, slots=True)
class TPGroup:
    """The ranks that hold one model between them. `size` 1 is the whole model in one process: no communication.

    `backend` is a torch.distributed process group when `size` > 1.
    """

    rank: int = 0
    size: int = 1
    backend: torch.distributed.ProcessGroup | None = None

    def shard(self, total: int, what: str) -> int:
        """This rank's share of `total` units of `what`; every rank has the same.

        Raises:
            ConfigError: `total` doesn't divide by the number of ranks.
        """
        if total % self.size:
            fits = [n for n in range(1, total + 1) if total % n == 0]
            raise ConfigError(f"{total} {what} can't be split over {self.size} ranks; ranks that work: {fits}")
        return total // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x, group=self.backend)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """`x` [..., d] of every rank, side by side along the last dimension: [..., size * d]."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.backend)
        return torch.cat(parts, dim=-1)
