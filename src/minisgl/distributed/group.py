"""`TPGroup`: what a layer or the loader asks of the other ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from minisgl.types import CommunicationError, ConfigError


class Communicator(Protocol):
    """What carries a group's collectives out. Tensors are contiguous; ranks call in the same order.

    Failures are raised as RuntimeError; `TPGroup` tells which collective it was.
    """

    def all_reduce(self, x: Tensor) -> None:
        """Sum over the ranks, in place."""

    def all_gather(self, x: Tensor) -> Tensor:
        """`x` [...] of every rank: [size, ...]."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum of `x` [size, ...] over the ranks, of which this rank gets its own row [...]."""

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """See `TPGroup.workspace`."""

    def close(self) -> None:
        """Frees what the group holds; idempotent."""

    def abort(self) -> None:
        """See `TPGroup.abort`."""


@dataclass(frozen=True, slots=True)
class TPGroup:
    """The ranks that hold one model between them. `size` 1 is the whole model in one process: no communication.

    Every rank must make the same calls with the same shapes in the same order. On CUDA they go onto the current
    stream, and into the CUDA graph that captures it. `backend` carries them out when `size` > 1.

    Raises (all collectives):
        CommunicationError: another rank ended, or the ranks disagree.
    """

    rank: int = 0
    size: int = 1
    backend: Communicator | None = None

    @classmethod
    def connect(cls, rank: int, size: int, device: torch.device, rendezvous: Path, timeout_s: float = 600.0) -> TPGroup:
        """Meets the other ranks; every rank of the group calls this.

        Args:
            device: decides the transport: gloo over the loopback interface for a CPU, NCCL for a GPU (through nccl4py
                where it is installed, else torch's).
            rendezvous: a folder that exists, is private to this group, new for each group and seen by all ranks.
            timeout_s: seconds to wait for the others, here and in every collective on a CPU.

        Raises:
            ConfigError: a rank outside the group, or no such folder.
            CommunicationError: not all ranks came in time.
        """
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} of a group of {size} ranks; expected a rank from 0 to {size - 1}")
        if size == 1:
            return cls()
        if not rendezvous.is_dir():
            raise ConfigError(f"the ranks' meeting place {rendezvous} is no folder; create it before the ranks start")
        with _typed("connect", rank, size):
            return cls(rank, size, communicator(rank, size, device, rendezvous, timeout_s))

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
        """Sum of `x` over the ranks, in place; returns `x`. No copies are made of a tensor from `workspace`.

        Of a tensor on the CPU, it returns once every rank's host has called it.
        """
        if self.backend is not None:
            with _typed("all_reduce", self.rank, self.size):
                whole = x.contiguous()
                self.backend.all_reduce(whole)
                if whole is not x:
                    x.copy_(whole)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """`x` [..., d] of every rank, side by side along the last dimension: [..., size * d]."""
        if self.backend is None:
            return x
        with _typed("all_gather", self.rank, self.size):
            parts = self.backend.all_gather(x.contiguous())  # [size, ..., d]
        return parts.movedim(0, -2).reshape(*x.shape[:-1], self.size * x.shape[-1])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum of `x` [..., size * d] over the ranks, of which this rank gets its part [..., d] of the last dimension.

        So `all_gather(reduce_scatter(x))` is `all_reduce(x)`.

        Raises:
            ConfigError: the last dimension doesn't divide by the number of ranks.
        """
        if self.backend is None:
            return x
        width = self.shard(x.shape[-1], "columns")
        parts = x.reshape(*x.shape[:-1], self.size, width).movedim(-2, 0).contiguous()  # [size, ..., d]
        with _typed("reduce_scatter", self.rank, self.size):
            return self.backend.reduce_scatter(parts)

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A buffer of `shape` for a projection to write into (`out=`), so that `all_reduce` of it needs no copy.

        Every call gives the same memory: what it holds is good until something else is written to a workspace.
        None where there is no such buffer: on a CPU, in a group of one, or for a tensor larger than the buffer.
        """
        return None if self.backend is None else self.backend.workspace(shape, dtype)

    def close(self) -> None:
        """Frees what the group holds; call it on every rank, once nothing is in flight. Closing twice does nothing."""
        if self.backend is not None:
            self.backend.close()

    def abort(self) -> None:
        """Lets go of what waits for a rank that has ended; from any thread. Nothing but `close` works afterwards."""
        if self.backend is not None:
            self.backend.abort()


def communicator(rank: int, size: int, device: torch.device, rendezvous: Path, timeout_s: float) -> Communicator:
    """What `TPGroup.connect` puts into a group; also for a group of one, which has no need of it but to be measured."""
    from minisgl.distributed import torch_comm

    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"no communicator for ranks on device {device}; expected cpu or cuda")
    store = torch_comm.meet(rendezvous, size, timeout_s)
    ours = device.type == "cuda" and find_spec("nccl") is not None
    keys = torch_comm.CommonKeys(store) if ours else None
    host = torch_comm.gloo_group(rank, size, store, timeout_s, keys)
    if device.type == "cpu":
        return torch_comm.TorchCommunicator(host)
    os.environ.update(torch_comm.NO_MULTICAST)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # one host: NCCL's own meeting place needs no network
    torch.cuda.set_device(device)
    if keys is None:
        return torch_comm.TorchCommunicator(torch_comm.nccl_group(rank, size, store, timeout_s, host))
    from minisgl.distributed.nccl import NcclCommunicator

    return NcclCommunicator(rank, size, device, torch_comm.TorchCommunicator(host), keys)


@contextmanager
def _typed(what: str, rank: int, size: int) -> Iterator[None]:
    """Turns a transport's RuntimeError into ours."""
    try:
        yield
    except RuntimeError as e:
        hint = "another rank has ended, or the ranks don't make the same calls"
        raise CommunicationError(f"{what} failed on rank {rank} of {size} ({hint}): {e}") from e
