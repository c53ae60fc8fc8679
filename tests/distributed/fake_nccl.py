"""An `nccl` package whose collectives go over gloo, on CPU tensors: of nccl4py 0.6 as much as `nccl.py` uses."""

from __future__ import annotations

import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.distributed.torch_comm import TorchCommunicator, gloo_group, meet

UNIQUE = bytes(range(128))


class NCCLError(Exception):
    pass


class NcclInvalid(Exception):
    pass


class UniqueId:
    def __init__(self, data: bytes = UNIQUE) -> None:
        self.data = data

    def __bytes__(self) -> bytes:
        return self.data

    @staticmethod
    def from_bytes(data: bytes) -> UniqueId:
        return UniqueId(data)


class Communicator:
    """NCCL's communicator; `gloo` carries it."""

    gloo: Any = None
    windows: list[Tensor] = []
    is_valid = True
    held = threading.Event()  # set: no graph holds a call any more

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: UniqueId) -> Communicator:
        assert bytes(unique_id) == UNIQUE  # rank 0's reached this rank
        return cls()

    def register_window(self, buffer: Tensor, flags: int) -> Any:
        assert flags == WindowFlag.COLL_SYMMETRIC
        self.windows.append(buffer)
        return types.SimpleNamespace(is_valid=True)

    def _check(self) -> None:
        if not self.is_valid:
            raise NcclInvalid("Communicator not initialized")

    def allreduce(self, sendbuf: Tensor, recvbuf: Tensor, op: int, *, stream: int) -> None:
        self._check()
        assert sendbuf is recvbuf and op == SUM and stream == 7
        self.gloo.all_reduce(recvbuf)

    def allgather(self, sendbuf: Tensor, recvbuf: Tensor, *, stream: int) -> None:
        self._check()
        recvbuf.copy_(self.gloo.all_gather(sendbuf.contiguous()))

    def destroy(self) -> None:
        """As NCCL's, it waits for the last graph."""
        assert self.held.wait(60)
        self.is_valid = False

    abort = destroy


class WindowFlag:
    COLL_SYMMETRIC = 1


SUM = 0


def install(group: TPGroup) -> None:
    """Puts the package, and a GPU for each rank, where `minisgl.distributed.nccl` looks for them."""
    from minisgl.distributed import nccl as ours
    from minisgl.distributed import probe

    Communicator.gloo = group.backend
    core: Any = types.ModuleType("nccl.core")
    for thing in (NcclInvalid, UniqueId, Communicator, WindowFlag):
        setattr(core, thing.__name__, thing)
    core.SUM, core.get_unique_id = SUM, UniqueId
    core.torch = types.SimpleNamespace(empty=lambda *size, dtype, device: torch.empty(*size, dtype=dtype))
    library = types.SimpleNamespace(version="2.28.9")
    core.get_version = lambda: types.SimpleNamespace(libnccl=library)
    bindings: Any = types.ModuleType("nccl.bindings.nccl")
    bindings.NCCLError = NCCLError
    package, parent = types.ModuleType("nccl"), types.ModuleType("nccl.bindings")
    package.__dict__["core"] = core
    parent.__dict__["nccl"] = bindings
    modules = {"nccl": package, "nccl.core": core, "nccl.bindings": parent, "nccl.bindings.nccl": bindings}
    sys.modules.update(modules)
    cuda: Any = torch.cuda
    cuda.current_device, cuda.device_count = lambda: group.rank, lambda: group.size
    cuda.can_device_access_peer, cuda.synchronize = lambda a, b: False, lambda *_: None
    cuda.set_device = lambda *_: None
    cuda.get_device_properties = lambda device: types.SimpleNamespace(name="GPU", uuid=f"number {device.index}")
    ours._stream = lambda: 7
    probe.SIZES = (1 << 10, 1 << 12, 1 << 27)
    measure = probe.measure
    ours.measure = lambda reduce, device: measure(reduce, torch.device("cpu"))
    probe.time_path = _time_path


def _time_path(run: Any, x: Tensor) -> float:
    """Made-up times by which NCCL's window is the fastest way; the path runs, as it would to be timed."""
    run(x[: 1 << 9].zero_())
    inside = any(window.data_ptr() == x.data_ptr() for window in Communicator.windows)
    return (1.0 if inside else 2.0) + x.nbytes / 1e6


def start(group: TPGroup, folder: str, cache: str) -> list[Any]:
    """Starts a communicator, sums through it, closes it; what each rank saw."""
    install(group)
    from minisgl.distributed import nccl as ours

    os.environ["MINISGL_CACHE"] = cache
    store = meet(Path(folder), group.size, 120.0)
    host = TorchCommunicator(gloo_group(group.rank, group.size, store, 120.0))
    comm = ours.NcclCommunicator(group.rank, group.size, torch.device("cuda", group.rank), host, store)
    x = torch.full((100,), float(group.rank + 1))
    comm.reduce(x)
    assert torch.equal(x, torch.full((100,), sum(range(1, group.size + 1)) * 1.0))
    space = comm.workspace((4, 8), torch.float16)
    assert space is not None
    space.fill_(1)
    comm.reduce(space)
    assert torch.equal(space, torch.full((4, 8), group.size, dtype=torch.float16))
    out = comm.all_gather_into(torch.zeros(group.size, 3), torch.full((3,), float(group.rank)))
    assert out[:, 0].tolist() == list(range(group.size))
    assert comm.reduce.table is not None
    seen = [sorted(comm.reduce.paths), comm.reduce.table.to_json(), sorted(comm.start_s)]
    ours.END_S = 0.05
    comm.close()
    seen.append("registered" in comm.reduce.places)  # the buffer is kept while NCCL may still need it
    Communicator.held.set()
    ours.END_S = 60.0
    comm.close()
    seen.append("registered" in comm.reduce.places)
    try:
        comm.reduce(x)
    except RuntimeError as error:
        seen.append(str(error))
    return seen
