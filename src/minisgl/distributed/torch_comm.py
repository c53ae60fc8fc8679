"""Collectives by torch's process groups: gloo between ranks on CPUs (and what the hosts of ranks on GPUs say)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

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


def gloo_group(rank: int, size: int, store: Store, timeout_s: float) -> dist.ProcessGroup:
    """A process group of its own: torch's global default group stays untouched, so engines don't collide.

    It listens on the loopback interface alone.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, options)
    group = dist.ProcessGroup(PrefixStore("group", store), rank, size)
    group._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    host_barrier(group)  # nobody leaves before everybody has reached everybody: that would fail their start
    return group


def host_barrier(group: dist.ProcessGroup) -> None:
    options = dist.BarrierOptions()
    options.device = CPU
    group.barrier(options).wait()


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

    def broadcast(self, x: Tensor, src: int) -> None:
        self.group.broadcast(x, src).wait()

    def barrier(self) -> None:
        host_barrier(self.group)

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
