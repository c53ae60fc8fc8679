"""The processes of ranks 1, 2, … of a model that is split: what runs in them, and how rank 0 starts and ends them.

Each is connected to rank 0 by a pair of sockets without a name. Its end of file is how both sides learn of a death, and
a thread on either side waits for just that: whoever hangs in a collective with the dead can't look for it. Nothing here
imports torch, so that a rank watches its parent from the first moment on.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minisgl import messages
from minisgl.config import EngineConfig
from minisgl.engine.children import PrivateFolder, exit_text, ignore_sigint
from minisgl.timing import phase
from minisgl.types import CommunicationError, ConfigError, EngineDeadError, MinisglError

if TYPE_CHECKING:
    from minisgl.distributed import TPGroup

logger = logging.getLogger(__name__)

WATCH_VARIABLE = "MINISGL_WATCH_RANKS"
PARENT_CHECK_S = 1.0
GRACE_S = 0.2  # in which ranks that fail together tell why
BLAME_S = 10.0  # in which a rank that broke a collective is found dead
HANG_S = 20.0  # that rank 0 may go on without the others before it counts as hanging
STOP_S = 1.5  # for ranks that were told to end; less than the server gives the engine


def rank_main(config: EngineConfig, rank: int, folder: str, parent_pid: int, link: Connection) -> None:
    """Body of the process of rank 1, 2, …: tells rank 0 how its start goes, then does as it is told.

    Args:
        config: resolved; its `model` is a path on this machine.
        folder: where the ranks meet.
        parent_pid: rank 0, to end with.
        link: `ToRank` messages come in, `FromRank` messages go out.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group: rank 0 acts on them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent_pid, folder), daemon=True).start()
    code = 1
    try:
        _speak(rank, os.environ.get(WATCH_VARIABLE, ""))
        from minisgl.engine.lead import follow

        follow(config, rank, Path(folder), link)
        code = 0
    except EOFError:
        pass  # rank 0 has ended
    except MinisglError as error:
        _tell(link, messages.RankFailed(str(error), lost_peer=isinstance(error, CommunicationError)))
    except BaseException as error:
        _tell(link, messages.RankFailed(f"{type(error).__name__}: {error}", traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no destructor of a broken group may hang


def _speak(rank: int, stacks_s: str) -> None:
    """What the rank logs: nothing, since rank 0 says it for all; or everything, and where it is every so often."""
    if not stacks_s:
        logging.disable(logging.WARNING)
        return
    if not stacks_s.isdecimal() or not int(stacks_s):
        raise ConfigError(f"{WATCH_VARIABLE} is {stacks_s!r}; expected a number of seconds")
    logging.basicConfig(format=f"%(asctime)s rank {rank}: %(message)s")
    logging.getLogger("minisgl").setLevel(logging.DEBUG)
    faulthandler.dump_traceback_later(int(stacks_s), repeat=True)


def _end_with_parent(parent_pid: int, folder: str) -> None:
    """Ends this process when rank 0 has ended, and removes what it couldn't. PR_SET_PDEATHSIG won't do: it is sent when
    the thread ends that started the process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent_pid and not connection.wait([parent.sentinel], PARENT_CHECK_S):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _tell(link: Connection, message: messages.FromRank) -> None:
    with contextlib.suppress(OSError):
        link.send_bytes(messages.encode(message))


class Ranks:
    """Ranks 1 to `config.tp_size` - 1 as rank 0 holds them. When one fails, the others are killed, and whatever rank 0
    does with them raises EngineDeadError with the reason."""

    def __init__(self, config: EngineConfig) -> None:
        self.size, self._owner = config.tp_size, os.getpid()
        self.failure: EngineDeadError | None = None
        self.busy = False  # rank 0 does what may wait for the others
        self._on_gpu = config.device == "cuda"
        self._traceback = ""
        self._folder = PrivateFolder()
        self._failed, self._explained = threading.Event(), threading.Event()
        self._closing = threading.Event()
        self._ending = threading.Lock()  # processes are ended by the watcher or by `close`
        self._group: TPGroup | None = None
        self._stages: SimpleQueue[Any] = SimpleQueue()  # an error where one comes instead; so in `_joined`
        self._joined: SimpleQueue[Any] = SimpleQueue()  # the group, once
        self._processes: list[Any] = []
        self._links: list[Connection] = []
        atexit.register(self.close)  # before multiprocessing's own, which would wait for the ranks
        try:
            with ignore_sigint(), _without_main():
                for rank in range(1, self.size):
                    self._start(config, rank)
        except BaseException:
            self.close(0)
            raise
        threading.Thread(target=self._watch, name="minisgl-ranks", daemon=True).start()

    def _start(self, config: EngineConfig, rank: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        args = (config, rank, str(self._folder.path), os.getpid(), theirs)
        process = context.Process(target=rank_main, args=args, name=f"minisgl-rank-{rank}", daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        self._links.append(ours)

    # -- the start -----------------------------------------------------------------------------------------------

    def connect(self, join: Callable[[Path], TPGroup]) -> TPGroup:
        """The group, by `join(folder)`, once every rank is up.

        In a thread of its own: a rank that dies meanwhile would hold it up until its time is out.
        """

        def body() -> None:
            try:
                self._joined.put(join(self._folder.path))
            except BaseException as error:
                self._joined.put(error)

        with phase("the other ranks' processes"):
            self.gather()
        threading.Thread(target=body, daemon=True).start()
        group: TPGroup = _take(self._joined)
        self._group, self.busy = group, True
        return group

    def agree(self, num_pages: int) -> int:
        """The fewest pages that any rank has room for, given rank 0's; every rank learns them."""
        fewest = min(num_pages, *self.gather())
        self.send(messages.RankStage(fewest))
        return fewest

    def gather(self) -> list[int]:
        """Waits until every rank has reached the next stage of its start; the pages that they told."""
        return [_take(self._stages).num_pages for _ in self._links]

    # -- messages ------------------------------------------------------------------------------------------------

    def send(self, message: messages.ToRank) -> int:
        """Sends `message` to every rank; its size in bytes.

        Raises:
            OSError: one has gone; `explain` tells why.
        """
        data = messages.encode(message)
        for link in self._links:
            link.send_bytes(data)
        return len(data)

    def explain(self, error: BaseException) -> None:
        """Raises what a rank failed of, if that is why `error` came."""
        if isinstance(error, (CommunicationError, OSError)):
            self._failed.wait(BLAME_S)
        if self.failure is None:
            return
        self._explained.set()
        if self._traceback:
            logger.error("%s\n%s", self.failure, self._traceback)
            self._traceback = ""
        raise self.failure from None

    def _watch(self) -> None:
        """Reads what ranks say, until all have ended or one has failed."""
        ranks = {link: rank for rank, link in enumerate(self._links, 1)}
        failures: dict[int, messages.RankFailed | None] = {}  # None: it died without a word
        while ranks and (ready := connection.wait(list(ranks), GRACE_S if failures else None)):
            for link in ready:
                assert isinstance(link, Connection)
                try:
                    message = messages.decode_from_rank(link.recv_bytes())
                except (EOFError, OSError):
                    failures.setdefault(ranks.pop(link), None)
                    continue
                if isinstance(message, messages.RankFailed):
                    failures[ranks[link]] = message
                else:
                    self._stages.put(message)
        if not self._closing.is_set():
            self._fail(failures)

    def _fail(self, failures: dict[int, messages.RankFailed | None]) -> None:
        """Blames one that died without a word first, one that lost another last."""
        rank, told = min(failures.items(), key=lambda item: 0 if item[1] is None else 1 + item[1].lost_peer)
        text = exit_text(self._processes[rank - 1], f"rank {rank}") if told is None else f"rank {rank}: {told.error}"
        self._end(0)
        self._traceback = told.traceback if told is not None else ""
        self.failure = EngineDeadError(text)
        self._failed.set()
        for queue in (self._stages, self._joined):
            queue.put(self.failure)
        if self._on_gpu and self._group is not None:
            self._let_go(self._group)

    def _let_go(self, group: TPGroup) -> None:
        """Frees rank 0 from a collective with the dead; where a kernel spins for them, only its process's end does."""
        group.abort()
        if not self._explained.wait(HANG_S) and self.busy:
            logger.critical("%s; the GPU waits for it, which ends only with this process", self.failure)
            os._exit(1)

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self, timeout: float = STOP_S) -> None:
        """Tells the ranks to end, and kills those that still run after `timeout` seconds. Idempotent."""
        if self._closing.is_set() or os.getpid() != self._owner:  # a fork's exit isn't ours
            return
        self._closing.set()
        atexit.unregister(self.close)
        if timeout:  # or they may be too far behind to take a message
            with contextlib.suppress(OSError):
                self.send(messages.Shutdown())
        self._end(timeout)
        self.failure = self.failure or EngineDeadError("the engine is closed")

    def _end(self, timeout: float) -> None:
        with self._ending:
            if self._group is not None and timeout:
                self._group.close()
            deadline = time.monotonic() + timeout
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
                process.kill()
                process.join()
            self._folder.remove()


def _take(queue: SimpleQueue[Any]) -> Any:
    found = queue.get()
    if isinstance(found, BaseException):
        raise found
    return found


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A child spawned meanwhile doesn't run the main script again, which then needs no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
