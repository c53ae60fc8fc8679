"""A program in a pseudo-terminal, and the screen that a person would see."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

import pytest

pyte = pytest.importorskip("pyte", reason="a terminal's screen, of the packages for development")

COLUMNS, LINES = 100, 120  # high enough that nothing scrolls away
TIMEOUT_S = 90
ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"


class _Screen(pyte.Screen):
    """Answers the terminal's questions: prompt_toolkit asks where the cursor is."""

    master = -1

    def write_process_input(self, data: str) -> None:
        os.write(self.master, data.encode())


class PseudoTerminal:
    """Runs a command with a pseudo-terminal for everything, as a shell in a terminal window would."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self._screen = _Screen(COLUMNS, LINES)
        self._screen.master = self._master
        self._stream = pyte.ByteStream(self._screen)
        self.raw = ""  # everything that came, escape sequences included
        self.seen: list[str] = []  # the screen's text after each piece that came
        env = {**env, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        self.process = subprocess.Popen(command, preexec_fn=lambda: os.login_tty(slave), env=env, close_fds=True)
        os.close(slave)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def text(self) -> str:
        """What is on the screen now."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def lines(self) -> list[str]:
        return self.text().splitlines()

    def wait(self, condition: Callable[[str], bool], timeout: float = TIMEOUT_S) -> str:
        """Reads until `condition` holds for the screen's text; returns that text."""
        deadline = time.monotonic() + timeout
        while not condition(self.text()):
            assert time.monotonic() < deadline, f"timed out; on the screen:\n{self.text()}"
            if not self._read() and not condition(self.text()):
                raise AssertionError(f"the program ended; on the screen:\n{self.text()}")
        return self.text()

    def settle(self, quiet_s: float = 0.3) -> None:
        """Reads until nothing has come for a while."""
        changed, seen = time.monotonic(), len(self.raw)
        while time.monotonic() < changed + quiet_s:
            self._read()
            if len(self.raw) != seen:
                changed, seen = time.monotonic(), len(self.raw)

    def wait_for(self, text: str, timeout: float = TIMEOUT_S) -> str:
        return self.wait(lambda screen: text in screen, timeout)

    def _read(self) -> bool:
        """Feeds what has come within a moment to the screen; False once the program is gone."""
        if not select.select([self._master], [], [], 0.05)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # nobody holds the other end any more
            return False
        self.raw += data.decode(errors="replace")
        self._stream.feed(data)
        self.seen.append(self.text())
        return bool(data)

    def exit_code(self, timeout: float = 30) -> int:
        deadline = time.monotonic() + timeout
        while self._read():
            assert time.monotonic() < deadline, f"still there; on the screen:\n{self.text()}"
        return self.process.wait(timeout)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)
