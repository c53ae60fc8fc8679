"""Torch's symmetric memory: a buffer that the kernels of all ranks read and write, for small all-reduces.

None of the `multimem` operators, which need multicast, is used.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, _register_process_group, _SymmetricMemory

from minisgl.distributed.allreduce import view_of

_numbers = itertools.count()


class SymmetricBuffer:
    """`num_bytes` on each rank's GPU, mapped into every rank. Constructing it is collective.

    One stream at a time may use it. A call ends only when every rank has read what it needs, so the next kernel may
    overwrite the buffer.

    Raises:
        RuntimeError: the GPUs can't map one another's memory.
    """

    def __init__(self, group: dist.ProcessGroup, store: Store, device: torch.device, num_bytes: int) -> None:
        self.name = register(group, PrefixStore("symmetric", store))
        self._group = group
        self.bytes = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
        self._handle = _SymmetricMemory.rendezvous(self.bytes, self.name)

    def one_shot(self, x: Tensor) -> None:
        """Sum of `x` over the ranks, in place: each thread copies its part of `x` in, waits, and adds up all ranks'."""
        place = view_of(self.bytes, tuple(x.shape), x.dtype)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(place, x, "sum", self.name, x)

    def two_shot(self, x: Tensor) -> None:
        """Sum over the ranks, in place, of a tensor at the beginning of the buffer."""
        torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.name)


def register(group: dist.ProcessGroup, store: Store) -> str:
    """A name by which torch's symmetric memory finds `group`, as long as the caller holds it.

    It meets through `store`. Versions of torch look for the name in one of two places.
    """
    name = f"minisgl-{next(_numbers)}"
    group._set_group_name(name)  # type: ignore[arg-type]
    _register_process_group(name, group)  # type: ignore[arg-type]
    _SymmetricMemory.set_group_info(name, group.rank(), group.size(), store)
    return name
