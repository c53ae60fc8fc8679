"""A progress bar in bytes, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(label: str, total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by a number of bytes; without `show` it does nothing."""
    if not show:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
