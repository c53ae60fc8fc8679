"""Torch's symmetric memory: a buffer that the kernels of all ranks read and write, for small all-reduces.

None of the `multimem` operators, which need multicast, is used.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import Store, _register_process_group, _SymmetricMemory

if TYPE_CHECKING:
    from minisgl.distributed.triton_one_shot import OneShot

_numbers = itertools.count()


class SymmetricBuffer:
    """`num_bytes` on each rank's GPU, mapped into every rank. Constructing it is collective.

    store: where the ranks meet, `CommonKeys`; older versions of torch ask it, newer ones that of `group`.

    One stream at a time may use it. A call ends only when every rank has read what it needs, so the next kernel may
    overwrite the buffer.

    Raises:
        RuntimeError: the GPUs can't map one another's memory.
    """

    def __init__(self, group: dist.ProcessGroup, store: Store, device: torch.device, num_bytes: int) -> None:
        self.name = register(group, store)
        self._group, self._store = group, store  # torch keeps neither
        self.bytes = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
        self._handle = handle = _SymmetricMemory.rendezvous(self.bytes, self.name)
        # Signals of the ranks, by receiver: a sender waits for 0 and puts 1, a receiver waits for 1 and puts 0.
        self._signals = [handle.get_signal_pad(r).view(torch.int32) for r in range(handle.world_size)]
        self.one_shot = self._one_shot(device) if handle.world_size.bit_count() == 1 else None
        self._set, self._clear = torch.ones_like(self._signals[0]), torch.zeros_like(self._signals[0])

    def _one_shot(self, device: torch.device) -> OneShot:
        from minisgl.distributed.triton_one_shot import NUM_SLOTS, OneShot

        shape, size = (self._handle.world_size * NUM_SLOTS,), self._handle.world_size
        self._slots = _SymmetricMemory.empty_strided_p2p(shape, (1,), torch.int64, device).zero_()
        torch.cuda.synchronize(device)  # before anybody may write there
        self._reach = reach = _SymmetricMemory.rendezvous(self._slots, self.name)
        return OneShot([reach.get_buffer(r, shape, torch.int64).data_ptr() for r in range(size)], reach.rank, device)

    def two_shot(self, x: Tensor) -> None:
        """Sum over the ranks, in place, of a tensor at the beginning of the buffer."""
        torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.name)

    def release(self, seconds: float) -> None:
        """Lets kernels go on that wait for ranks that have ended; what they sum up is of no use.

        Returns when the GPU has nothing left to do, or after `seconds`. Copies alone: a kernel might have to be loaded,
        which waits for those that run.
        """
        device, end = self.bytes.device, time.monotonic() + seconds
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            while not torch.cuda.default_stream(device).query() and time.monotonic() < end:
                if self.one_shot is not None:
                    self.one_shot.stop.copy_(self._set[:1])
                for rank, signals in enumerate(self._signals):
                    signals.copy_(self._set if rank == self._handle.rank else self._clear)


def register(group: dist.ProcessGroup, store: Store) -> str:
    """A name by which torch's symmetric memory finds `group`, as long as the caller holds it.

    It meets through `store`. Versions of torch look for the name in one of two places.
    """
    name = f"minisgl-{next(_numbers)}"
    group._set_group_name(name)  # type: ignore[arg-type]
    _register_process_group(name, group)  # type: ignore[arg-type]
    _SymmetricMemory.set_group_info(name, group.rank(), group.size(), store)
    return name
