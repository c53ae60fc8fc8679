"""Runs a function on the ranks of a real group, with limits for a loaded machine."""

from __future__ import annotations

from typing import Any

from minisgl.profiling.ranks import Body, run_ranks

LIMIT_S = 240.0  # generous: the processes of a loaded machine start slowly


def run_world(
    size: int, body: Body, *args: Any, device: str = "cpu", mortal: frozenset[int] = frozenset()
) -> list[Any]:
    """`body(group, *args)` on every rank of a group of `size`, each a process; their results by rank."""
    return run_ranks(size, device, body, *args, limit_s=LIMIT_S, mortal=mortal)
