"""What the measuring actions share: their options, tables, progress, and the file at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.profiling.record import Record

if TYPE_CHECKING:
    from rich.console import Console

OUT = Path("out/profile")


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every measurement."""
    parser.add_argument("--quick", action="store_true", help="few sizes and samples, to see that it works")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder for the JSON (default: {OUT})")


def console() -> Console:
    """Standard output; as wide as a table wants where nobody's terminal says otherwise."""
    from rich.console import Console  # here, since `minisgl doctor` must come to where rich is missing

    return Console() if sys.stdout.isatty() else Console(width=140)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; columns whose name doesn't end in a colon are numbers, to the right."""
    from rich.table import Table

    page = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        page.add_column(name.rstrip(":"), justify="left" if name.endswith(":") else "right")
    for row in rows:
        page.add_row(*("–" if cell is None else str(cell) for cell in row))
    console().print(page)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error where a person watches; yields the function to call after each of `total` pieces."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def model_name(model: str) -> str:
    """A model as a report may name it: of a file or folder only what it is called, not where it lies."""
    return Path(model).name if Path(model).exists() else model


def us(row: dict[str, Any]) -> str:
    """The time of a row: its median, and p10 to p90."""
    times = row["us"]
    return f"{times['median']:.2f} ({times['p10']:.2f}–{times['p90']:.2f})"


def config(row: dict[str, Any]) -> str:
    """The launch configuration of a row; empty where it is the tuned one or there is none."""
    c = row["config"]
    return "" if c is None else f"{c['threads']} threads × {c['work']}" + ("" if c["pdl"] else ", no PDL")


def of_limit(row: dict[str, Any]) -> str:
    """How near a row comes to the limit that binds."""
    cached = " (cached)" if row["limit"] == "cpu" and row["fraction"] > 1 else ""
    return f"{row['fraction']:.0%} of {row['limit']}{cached}"


def ceilings(record: Record) -> None:
    """Prints the ceilings that the rows are compared with."""
    if record.ceilings:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in record.ceilings.items())
        console().print(f"{record.hardware['name']}: {shown}", highlight=False)


def finish(record: Record, folder: Path) -> None:
    """Says what was left out, writes the record and says where.

    Raises:
        MinisglError: it can't be written.
    """
    for note in record.skipped:
        print(f"skipped {note['what']}: {note['why']}")
    print(f"written to {record.write(folder)}")
