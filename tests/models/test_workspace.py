"""Projections that ranks add up write where the communicator wants their summands, and nobody reads those later."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.models.registry import load_model

Checkpoint = Callable[[str], tuple[Path, Any]]
LIMIT_S = 120


class Meeting:
    """Where two ranks, threads of this process, exchange tensors."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=LIMIT_S)
        self.slots: list[Tensor] = [torch.empty(0)] * 2

    def exchange(self, rank: int, x: Tensor) -> Tensor:
        self.slots[rank] = x.clone()
        self.barrier.wait()
        got = torch.stack(self.slots)
        self.barrier.wait()
        return got


class OneBuffer:
    """A communicator whose workspace is one buffer, spoilt whenever it is handed out again."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting = rank, meeting
        self.buffer = torch.empty(1 << 16)
        self.in_place = 0

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        if dtype != torch.float32:
            return None
        return self.buffer.fill_(math.nan)[: math.prod(shape)].view(shape)

    def all_reduce(self, x: Tensor) -> None:
        self.in_place += x.data_ptr() == self.buffer.data_ptr()
        x.copy_(self.all_gather(x).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, x)


@pytest.mark.parametrize(("family", "sums"), [("llama_bias", 2), ("mistral", 2), ("qwen3", 2), ("qwen3_moe", 1)])
def test_summands_lie_in_the_workspace_and_are_read_before_the_next(
    checkpoint: Checkpoint, family: str, sums: int
) -> None:
    """Two sums a layer, one where a mixture of experts adds up in another dtype."""
    folder, oracle = checkpoint(family)
    ids = [(7 * i) % oracle.config.vocab_size for i in range(40)]

    def logits(tp: TPGroup) -> Tensor:
        model = load_model(folder, torch.float32, torch.device("cpu"), tp, progress=False)
        return tp.all_gather(Loop(model).logits(ids, chunk=20))[:, : oracle.config.vocab_size]

    meeting = Meeting()
    ranks: list[Any] = [OneBuffer(rank, meeting) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: logits(TPGroup(rank.rank, 2, rank)), ranks))
    for ours, rank in zip(found, ranks, strict=True):
        torch.testing.assert_close(ours, logits(TPGroup()), rtol=1e-4, atol=1e-4)
        assert rank.in_place == 2 * sums * oracle.config.num_hidden_layers  # in two chunks
