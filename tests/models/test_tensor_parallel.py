"""The tensor-parallel seams: two ranks, as threads that meet at a barrier, give the logits of one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.models import CausalLM, load_model
from minisgl.types import ConfigError

Checkpoint = Callable[[str], tuple[Path, Any]]


class Meeting:
    """Where the threads of a group exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.slots[rank] = x.clone()
        self.barrier.wait()
        got = list(self.slots)
        self.barrier.wait()
        return got


@dataclass(frozen=True)
class ThreadGroup(TPGroup):
    meeting: Any = None

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x), dim=-1)


def load(folder: Path, tp: TPGroup | None = None) -> CausalLM:
    return load_model(folder, torch.float32, torch.device("cpu"), tp, progress=False)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "mistral", "qwen3", "qwen3_moe"])
def test_two_ranks_give_the_logits_of_one(checkpoint: Checkpoint, family: str) -> None:
    """An odd vocabulary (a padded last range) in all; one key-value head that both ranks share in qwen3."""
    folder, oracle = checkpoint(family)
    ids = [(7 * i) % oracle.config.vocab_size for i in range(40)]
    expected = Loop(load(folder)).logits(ids)
    meeting = Meeting(2)

    def rank(i: int) -> Tensor:
        model = load(folder, ThreadGroup(rank=i, size=2, meeting=meeting))
        assert model.num_kv_heads_per_rank == max(1, model.config.num_kv_heads // 2)
        return Loop(model).logits(ids, chunk=20)

    with ThreadPoolExecutor(2) as pool:
        for logits in pool.map(rank, range(2)):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_ranks_that_do_not_divide_the_heads_are_refused(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama")
    with pytest.raises(ConfigError, match=r"heads can't be split over 3 ranks"):
        load(folder, TPGroup(rank=0, size=3))
