"""What parents and child processes of the engine have in common: a folder of their own, signals, and ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

_FOLDER = "minisgl-engine-"
_YOUNG_S = 60  # a folder without a lock may still get it


class PrivateFolder:
    """A folder of mode 0700, locked for as long as this process lives; those of processes killed before are removed."""

    def __init__(self) -> None:
        _remove_stale_folders()
        self._folder = tempfile.TemporaryDirectory(prefix=_FOLDER, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._folder.cleanup()


def _remove_stale_folders() -> None:
    """Removes the folders of parents that were killed: nobody holds their lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - folder.stat().st_mtime > _YOUNG_S:
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


@contextlib.contextmanager
def ignore_sigint() -> Iterator[None]:
    """A child started meanwhile ignores Ctrl-C from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def exit_text(process: BaseProcess, name: str) -> str:
    """Why the child called `name` ended, as far as the system knows."""
    process.join(1)
    code = process.exitcode
    if code is None:
        return f"{name} is ending"
    if code == -signal.SIGKILL:
        return f"{name} was killed (signal 9); the system does that when memory runs out"
    if code < 0:
        return f"{name} was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"{name} ended with exit code {code}"
