"""Runs a function on the ranks of a group of their own: one new process a rank."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from minisgl.distributed import TPGroup
from minisgl.types import CommunicationError

Body = Callable[..., Any]  # (group, *args) → plain Python values; lives in a module that a new process can import


def run_ranks(
    size: int, device: str, body: Body, *args: Any, limit_s: float = 600.0, mortal: frozenset[int] = frozenset()
) -> list[Any]:
    """`body(group, *args)` on every rank of a group of `size`; their results by rank.

    The processes end with this call, however it ends.

    Args:
        device: `cpu`, or `cuda` for a GPU a rank.
        limit_s: seconds within which all have to answer.
        mortal: ranks that may end without an answer; theirs is None.

    Raises:
        CommunicationError: a rank failed (with its traceback), ended without an answer, or didn't answer in time.
    """
    context = get_context("forkserver")  # forked from a process without threads that has torch imported
    context.set_forkserver_preload(["torch", "minisgl.distributed"])
    with tempfile.TemporaryDirectory(prefix="minisgl-ranks-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        shared = (size, device, folder, limit_s, dict(os.environ), body, args)
        ranks = [context.Process(target=_rank, args=(rank, pipes[rank][1], *shared)) for rank in range(size)]
        try:
            for process, (_, sender) in zip(ranks, pipes, strict=True):
                process.daemon = True
                process.start()
                sender.close()
            return _answers([receiver for receiver, _ in pipes], limit_s, mortal)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _answers(receivers: Sequence[connection.Connection], limit_s: float, mortal: frozenset[int]) -> list[Any]:
    answers: list[Any] = [None] * len(receivers)
    waiting, end = dict(zip(receivers, range(len(receivers)), strict=True)), time.monotonic() + limit_s
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
        if not ready:
            raise CommunicationError(f"no answer within {limit_s:.0f} s from ranks {sorted(waiting.values())}")
        for receiver in ready:
            assert isinstance(receiver, connection.Connection)
            rank = waiting.pop(receiver)
            try:
                ok, answers[rank] = receiver.recv()
            except EOFError:
                ok, answers[rank] = rank in mortal, None if rank in mortal else "ended without an answer"
            if not ok:
                raise CommunicationError(f"rank {rank} of {len(receivers)}: {answers[rank]}")
    return answers


def _rank(
    rank: int,
    sender: connection.Connection,
    size: int,
    device: str,
    folder: str,
    limit_s: float,
    environment: dict[str, str],
    body: Body,
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the process that this one is forked from has that of its own start
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        group = _connect(rank, size, device, Path(folder), limit_s)
        sender.send((True, body(group, *args)))
        group.close()
    except BaseException:
        sender.send((False, traceback.format_exc()))


def _end_with_parent(parent: int) -> None:
    """The process that ranks are forked from ends with the one that asked for them."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _connect(rank: int, size: int, device: str, folder: Path, limit_s: float) -> TPGroup:
    from minisgl.distributed.group import communicator

    if device == "cpu":
        return TPGroup.connect(rank, size, torch.device("cpu"), folder, limit_s)
    return TPGroup(rank, size, communicator(rank, size, torch.device("cuda", rank), folder, limit_s))
