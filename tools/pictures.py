"""Draws the README's pictures: what `minisgl doctor` and `minisgl shell` show in a terminal, on this machine.

    PYTHONPATH=tests/cli .venv/bin/python tools/pictures.py

Both run in a pseudo-terminal, with the default model in a cache folder of their own. The line with the command is
added; the rest is theirs. Take them where minisgl is installed with its C++ extension and pyte is there (`make test`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path

import pseudo_terminal
import pyte
from pseudo_terminal import ENTER, PseudoTerminal

from minisgl.models.hub import resolve_model

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path("/tmp/minisgl")  # the doctor shows it
QUESTIONS = ("What is the capital of France?", "And of Italy?", "/stats", "/exit")
COLUMNS, ADVANCE, LINE, MARGIN = 108, 8, 19, 14  # in pixels: a column's width, a line's height, the space around
PAPER, INK = "#1c2128", "#d7dde4"
COLOURS = {"default": INK, "green": "#6cc070", "brown": "#d9b44a", "red": "#e5695e", "brightblack": "#8b949e"}
DIM, GREY = "\x1b[2m", "\x1b[90m"  # pyte forgets what is dim; grey it keeps


def main() -> None:
    """Writes doctor.svg and shell.svg.

    Raises:
        FileExistsError: /tmp/minisgl is there already; a run that was killed may have left it.
        SystemExit: a picture would show a path of this machine.
    """
    models = resolve_model("smollm2").parent
    pseudo_terminal.COLUMNS = COLUMNS
    CACHE.mkdir()
    try:
        (CACHE / "models").symlink_to(models)
        for command, messages in (("doctor", ()), ("shell --temperature 0", QUESTIONS)):
            picture = draw(command, record(command.split(), messages))
            if found := [path for path in (Path.home(), ROOT, sys.prefix) if str(path) in picture]:
                sys.exit(f"{command} shows {found[0]}; is something missing that it tells how to mend?")
            (ROOT / "docs" / "images" / f"{command.split()[0]}.svg").write_text(picture)
    finally:
        shutil.rmtree(CACHE)


def record(command: list[str], messages: Sequence[str]) -> pyte.Screen:
    """Runs minisgl and types the messages, each when the shell waits for it; returns the screen at the end."""
    whole, env = [sys.executable, "-m", "minisgl", *command], os.environ | {"MINISGL_CACHE": str(CACHE)}
    with closing(PseudoTerminal(whole, env)) as terminal:
        for number, message in enumerate(messages, 1):
            terminal.wait(partial(_asks, number))
            terminal.type(message + ENTER)
        terminal.exit_code()
    screen = pyte.Screen(COLUMNS, pseudo_terminal.LINES)
    pyte.Stream(screen).feed(terminal.raw.replace(DIM, GREY))
    return screen


def _asks(number: int, screen: str) -> bool:
    """Whether the shell waits for message `number`, from 1."""
    return screen.count("\n>") == number and screen.endswith("\n>")


def draw(command: str, screen: pyte.Screen) -> str:
    """The screen as SVG, below a line with the command."""
    height = max(row for row, text in enumerate(screen.display) if text.strip()) + 1
    body = [_text(1, 0, f"$ minisgl {command}", INK), *(span for row in range(height) for span in _spans(screen, row))]
    size = f'width="{COLUMNS * ADVANCE + 2 * MARGIN}" height="{(height + 1) * LINE + 2 * MARGIN}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="13">'
    return "\n".join([head, f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>', *body, "</svg>\n"])


def _spans(screen: pyte.Screen, row: int) -> Iterator[str]:
    """Pieces of one line that have one colour each."""
    cells = [screen.buffer[row][column] for column in range(len(screen.display[row].rstrip()))]
    for colour, group in groupby(enumerate(cells), lambda cell: cell[1].fg):
        columns, pieces = zip(*((column, cell.data) for column, cell in group), strict=True)
        yield _text(row + 2, columns[0], "".join(pieces), COLOURS.get(colour, f"#{colour}"))


def _text(line: int, column: int, text: str, colour: str) -> str:
    place = f'x="{MARGIN + column * ADVANCE}" y="{MARGIN + line * LINE - 5}" fill="{colour}"'
    stretch = f'textLength="{len(text) * ADVANCE}" xml:space="preserve"'  # whatever the font, columns stay aligned
    return f"<text {place} {stretch}>{escape(text, quote=False)}</text>"


if __name__ == "__main__":
    main()
