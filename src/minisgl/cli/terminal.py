"""Where a chat reads and writes: a person's terminal, or a pipe."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

# A model may write anything. What would move the cursor, or worse, is shown as a replacement character.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Terminal(Protocol):
    """What a chat needs of either. `interactive`: a person is there, who may stop an answer and try again."""

    interactive: bool

    def read(self) -> str:
        """The next message; EOFError when there is none, KeyboardInterrupt on Ctrl-C."""

    def show(self, text: str) -> None:
        """A piece of the answer."""

    def note(self, text: str) -> None:
        """A line that is no part of the answer."""


class Screen:
    """A person's terminal: lines are edited and remembered, notes are dim."""

    interactive = True

    def __init__(self, history: Path) -> None:
        self._history = _open_history(history)
        colour = not os.environ.get("NO_COLOR")
        self._dim, self._plain = (_DIM, _PLAIN) if colour else ("", "")
        self._at_line_start = True

    def read(self) -> str:
        from prompt_toolkit import PromptSession

        session: PromptSession[str] = PromptSession(
            history=self._history, multiline=True, key_bindings=_key_bindings(), prompt_continuation=". "
        )
        # While a line is edited Ctrl-C is a key. As a signal, just before or just after, it would hit the event loop
        # of prompt_toolkit as that is made or torn down, and neither survives that.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return session.prompt("> ", handle_sigint=False)
        finally:
            signal.signal(signal.SIGINT, before)

    def show(self, text: str) -> None:
        if text:
            self._at_line_start = text.endswith("\n")
            sys.stdout.write(_CONTROL.sub("\ufffd", text))
            sys.stdout.flush()

    def note(self, text: str) -> None:
        start = "" if self._at_line_start else "\n"
        self._at_line_start = True
        print(f"{start}{self._dim}{_CONTROL.sub(' ', text)}{self._plain}", flush=True)


class Pipe:
    """Each line that comes in is a message; answers go to standard output, notes to standard error."""

    interactive = False

    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")

    def read(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def show(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _open_history(path: Path) -> History:
    """The history in a file that only its owner can read; in memory where that file can't be had."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class LenientHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason to end a chat
                super().store_string(string)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
    except OSError:
        return InMemoryHistory()
    return LenientHistory(str(path))


def _key_bindings() -> KeyBindings:
    """Enter sends; Alt-Enter, or Enter behind a backslash, begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
