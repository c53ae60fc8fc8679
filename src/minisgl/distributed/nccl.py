"""Collectives between GPUs of one host: NCCL through nccl4py, and torch's symmetric memory for small all-reduces.

NCCL's buffer comes from its own allocator and is registered as a symmetric window, so that its kernels read and write
the other ranks' memory without copies of their own. Which way an all-reduce takes is measured, not guessed: `paths.py`
says which ways there are. Everything runs on the current stream, so CUDA graphs capture it.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from minisgl.distributed.allreduce import AllReduce
from minisgl.distributed.paths import Machine
from minisgl.distributed.probe import agreed_table, measure
from minisgl.distributed.symmetric import SymmetricBuffer
from minisgl.distributed.torch_comm import TorchCommunicator, broadcast_bytes, gather_bytes
from minisgl.hardware import read_text
from minisgl.timing import phase

WINDOW_BYTES = 64 << 20
SYMMETRIC_BYTES = 16 << 20
END_S = 2.0  # that ending NCCL may take
RELEASE_S = 1.0  # for kernels that wait for a rank that has ended


class NcclCommunicator:
    """One rank's end. Constructing it is collective; `device` must be the current one.

    Args:
        host: collectives between the ranks' hosts; it carries tensors on the CPU too, and is closed with this.
        store: where torch's symmetric memory meets.

    Raises:
        RuntimeError: NCCL refused.
    """

    def __init__(self, rank: int, size: int, device: torch.device, host: TorchCommunicator, store: Store) -> None:
        import nccl.core as nccl
        from nccl.bindings.nccl import NCCLError

        self.rank, self.size, self.device, self.host = rank, size, device, host
        self._ending: Thread | None = None
        self._errors = (nccl.NcclInvalid, NCCLError)
        unique = broadcast_bytes(host, bytes(nccl.get_unique_id()) if rank == 0 else b"")
        self.start_s: dict[str, float] = {}  # seconds that the parts of the start took
        with phase("init", self.start_s):
            self._comm: Any = self._try(nccl.Communicator.init, size, rank, nccl.UniqueId.from_bytes(unique))
        self._sum: Any = nccl.SUM
        self.reduce, self.machine = AllReduce(self._direct), self._machine(nccl)
        self._symmetric: SymmetricBuffer | None = None
        with phase("register", self.start_s):
            self._register(nccl)
        with phase("map", self.start_s):
            self._map_symmetric(store)
        with phase("settle", self.start_s):  # which way all-reduces go from now on
            self.reduce.table = agreed_table(host, rank, self.machine, lambda: measure(self.reduce, device))

    def _register(self, nccl: Any) -> None:
        """Registers NCCL's buffer, where NCCL and the links know symmetric windows."""
        window: Tensor = nccl.torch.empty(WINDOW_BYTES, dtype=torch.uint8, device=self.device)
        handle = self._try(self._comm.register_window, window, nccl.WindowFlag.COLL_SYMMETRIC)
        if self._all(handle.is_valid):
            self.reduce.add("registered", self._direct, window)

    def _map_symmetric(self, store: Store) -> None:
        """Maps torch's buffer, where every GPU can reach the others' memory."""
        own, devices = torch.cuda.current_device(), range(torch.cuda.device_count())
        if not self._all(all(torch.cuda.can_device_access_peer(own, d) for d in devices if d != own)):
            return
        try:
            found = SymmetricBuffer(self.host.group, store, self.device, SYMMETRIC_BYTES)
        except RuntimeError:
            found = None
        if self._all(found is not None) and found is not None:
            self._symmetric = found
            self.reduce.add("two_shot", found.two_shot, found.bytes)
            if found.one_shot is not None:
                self.reduce.paths["one_shot"] = found.one_shot

    def _all(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank."""
        flags = torch.tensor([int(flag)])
        self.host.all_reduce(flags)
        return int(flags) == self.size

    def _machine(self, nccl: Any) -> Machine:
        gpu, library = torch.cuda.get_device_properties(self.device), nccl.get_version().libnccl
        names = gather_bytes(self.host, f"{gpu.name};{getattr(gpu, 'uuid', '')}".encode())
        driver, version = read_text("/sys/module/nvidia/version"), str(library.version) if library else ""
        return Machine(tuple(n.decode() for n in names), driver, version, str(torch.__version__))

    def all_reduce(self, x: Tensor) -> None:
        if x.is_cuda:
            self.reduce(x)
        else:
            self.host.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return self.host.all_gather(x)
        return self.all_gather_into(x.new_empty((self.size, *x.shape)), x)

    def all_gather_into(self, out: Tensor, x: Tensor) -> Tensor:
        """`x` of every rank into `out` [size, ...]; without a copy where both lie in the window, `x` at its own row."""
        if x.numel():
            self._try(self._comm.allgather, x, out, stream=_stream())
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return self.host.reduce_scatter(x)
        out = torch.empty_like(x[0])
        if out.numel():
            self._try(self._comm.reduce_scatter, x, out, self._sum, stream=_stream())
        return out

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return self.reduce.workspace(shape, dtype)

    def close(self) -> None:
        if self._end(self._comm.destroy):
            self.reduce.close()  # a buffer goes after its window
            self._symmetric = None
        self.host.close()

    def abort(self) -> None:
        for _ in range(2):  # the GPU's work may wait in either's kernels, and the calls of one for the other's
            if self._symmetric is not None:
                self._symmetric.release(RELEASE_S)
            self._end(self._comm.abort)
        self.host.abort()

    def _end(self, call: Callable[[], None]) -> bool:
        """Ends NCCL's communicator in a thread of its own; whether that is done.

        NCCL waits there until every CUDA graph that holds one of its calls is gone, and for ranks that don't end.
        """

        def end() -> None:
            torch.cuda.set_device(self.device)
            call()

        if self._ending is None:
            self._ending = Thread(target=end, daemon=True)
            self._ending.start()
        self._ending.join(END_S)
        return not self._ending.is_alive()

    def _direct(self, x: Tensor) -> None:
        self._try(self._comm.allreduce, x, x, self._sum, stream=_stream())

    def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._ending is not None:
            raise RuntimeError("the group is closed")
        try:
            return call(*args, **options)
        except self._errors as e:
            raise RuntimeError(str(e)) from e


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
