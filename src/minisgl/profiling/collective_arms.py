"""Paths of an all-reduce against one another, on ranks of their own: what the rulings on collectives measure."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from minisgl.distributed import TPGroup
from minisgl.distributed.allreduce import AllReduce, view_of
from minisgl.distributed.probe import capture, replay_us
from minisgl.profiling.statistics import interleave

FIXED_BYTES = 1 << 20  # what the arm `fixed` copies into the registered buffer at most; above, the caller's tensor
_LONG = 4 << 20  # bytes from which few calls in a graph are long enough to time


def path_called(reduce: AllReduce, arm: str, num_bytes: int) -> str | None:
    """An arm's path: the one it names, `fixed` by the threshold, `measured` by the table; None where there is none."""
    if arm == "measured":
        found = reduce.table and reduce.table.choose(num_bytes, reduce.usable(num_bytes, torch.bfloat16))
        return found or "direct"
    wanted = ("registered_copy" if num_bytes <= FIXED_BYTES else "direct") if arm == "fixed" else arm
    return wanted if wanted in reduce.paths and num_bytes <= reduce.limit(wanted) else None


def times(group: TPGroup, arms: tuple[str, str], num_bytes: int, rounds: int) -> list[list[float]] | None:
    """Microseconds of either arm by round, the arms in turns; None where this group has no such path. Collective."""
    reduce: AllReduce | None = getattr(group.backend, "reduce", None)
    if reduce is None:
        return None
    comm: Any = group.backend
    paths = [path_called(reduce, arm, num_bytes) for arm in arms]
    if None in paths:
        return None
    calls, samplers = 4 if num_bytes >= _LONG else 32, {}
    scratch = torch.zeros(num_bytes, dtype=torch.uint8, device=comm.device)
    for arm, path in zip(arms, paths, strict=True):
        assert path is not None
        x = view_of(reduce.places.get(path, scratch), (num_bytes // 2,), torch.bfloat16)
        x.zero_()
        run = partial(reduce.paths[path], x)
        run()
        graph = capture(run, calls)
        samplers[arm] = lambda graph=graph: replay_us(graph) / calls
    return list(interleave(samplers, rounds).values())
