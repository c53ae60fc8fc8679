"""Runs a function on the ranks of a real group: one process a rank, gloo between them."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from minisgl.distributed import TPGroup

LIMIT_S = 120.0  # generous: the processes of a loaded machine start slowly
Body = Callable[..., Any]  # (group, *args) → plain Python values; lives in a module that a new process can import


def run_world(size: int, body: Body, *args: Any, mortal: frozenset[int] = frozenset()) -> list[Any]:
    """`body(group, *args)` on every rank of a group of `size`; their results by rank.

    Args:
        mortal: ranks that may end without an answer; theirs is None.

    Raises:
        AssertionError: a rank raised, ended without an answer, or none came in time.
    """
    context = get_context("forkserver")  # forked from a process without threads that has torch imported
    context.set_forkserver_preload(["torch", "minisgl.distributed"])
    with tempfile.TemporaryDirectory(prefix="minisgl-world-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(target=_rank, args=(body, rank, size, folder, pipes[rank][1], args), daemon=True)
            for rank in range(size)
        ]
        try:
            for process, (_, sender) in zip(ranks, pipes, strict=True):
                process.start()
                sender.close()
            return _answers([receiver for receiver, _ in pipes], mortal)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _answers(receivers: list[connection.Connection], mortal: frozenset[int]) -> list[Any]:
    answers: list[Any] = [None] * len(receivers)
    waiting, end = set(receivers), time.monotonic() + LIMIT_S
    while waiting:
        ready = connection.wait(waiting, max(0.0, end - time.monotonic()))
        assert ready, f"no answer within {LIMIT_S:.0f} s from ranks {sorted(receivers.index(r) for r in waiting)}"
        for receiver in ready:
            rank = receivers.index(receiver)
            waiting.remove(receiver)
            try:
                ok, answers[rank] = receiver.recv()
            except EOFError:
                ok = rank in mortal
                answers[rank] = None if ok else "ended without an answer"
            assert ok, f"rank {rank}: {answers[rank]}"
    return answers


def _rank(body: Body, rank: int, size: int, folder: str, sender: connection.Connection, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        group = TPGroup.connect(rank, size, torch.device("cpu"), Path(folder), timeout_s=LIMIT_S)
        sender.send((True, body(group, *args)))
        group.close()
    except BaseException:
        sender.send((False, traceback.format_exc()))
