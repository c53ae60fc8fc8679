"""Collectives by torch's process groups: gloo between ranks on CPUs (and what the hosts of ranks on GPUs say)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

CPU = torch.device("cpu")
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # environment, for NCCL and torch


def meet(rendezvous: Path, size: int, timeout_s: float) -> Store:
    """The store in folder `rendezvous` through which `size` ranks find one another: a file, so no port is taken."""
    store = FileStore(str(rendezvous / "store"), size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


class CommonKeys(Store):
    """Part of `store`, under keys that are the same on all ranks. Whoever uses it from C++ doesn't keep it alive.

    torch's symmetric memory numbers its keys by what its process has exchanged so far, in whichever group. A process
    that was in a group before would wait for keys other than those that new ones set. Here numbers begin at 0.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store, self._first = PrefixStore("common", store), -1

    def _common(self, key: str) -> str:
        def counted(number: re.Match[str]) -> str:
            if self._first < 0:
                self._first = int(number[0])
            return str(int(number[0]) - self._first)

        return re.sub(r"(?<=/)\d+", counted, key, count=1)

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._common(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._common(key))

    def add(self, key: str, value: int) -> int:
        return self._store.add(self._common(key), value)

    def wait(self, keys: Sequence[str], *timeout: Any) -> None:
        self._store.wait([self._common(key) for key in keys], *timeout)


def gloo_group(rank: int, size: int, store: Store, timeout_s: float, keys: Store | None = None) -> dist.ProcessGroup:
    """A process group of its own: torch's global default group stays untouched, so engines don't collide.

    It listens on the loopback interface alone. `keys`: through which others that know the group meet.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, options)
    group = dist.ProcessGroup(keys or PrefixStore("group", store), rank, size)
    group._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group.allreduce(
        torch.zeros(1)
    ).wait()  # nobody leaves before everybody has reached everybody: that would fail their start
    return group


def nccl_group(rank: int, size: int, store: Store, timeout_s: float, host: dist.ProcessGroup) -> dist.ProcessGroup:
    """`host` with NCCL, as torch brings it, for tensors on GPUs."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    nccl = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
    host._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
    return host


class TorchCommunicator:
    """The collectives of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.size = group.size()
        self._open: dist.ProcessGroup | None = group

    @property
    def group(self) -> dist.ProcessGroup:
        if self._open is None:
            raise RuntimeError("the group is closed")
        return self._open

    def all_reduce(self, x: Tensor) -> None:
        self.group.allreduce(x).wait()

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size, *x.shape))
        self.group.allgather(list(out.unbind()), x).wait()
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x[0])
        self.group.reduce_scatter(out, list(x.unbind())).wait()
        return out

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return None

    def close(self) -> None:
        self._open = None

    def abort(self) -> None:
        if self._open is not None:
            self._open.abort()


def broadcast_bytes(comm: TorchCommunicator, data: bytes) -> bytes:
    """Rank 0's `data` on every rank."""
    return gather_bytes(comm, data)[0]


def gather_bytes(comm: TorchCommunicator, data: bytes) -> list[bytes]:
    """Every rank's `data`, by rank."""
    lengths = comm.all_gather(torch.tensor(len(data))).tolist()
    buffer = torch.zeros(max(lengths), dtype=torch.uint8)
    if data:
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = comm.all_gather(buffer)
    return [row.numpy().tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]
