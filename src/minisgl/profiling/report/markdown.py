"""Pieces of Markdown, and figures as text. Every number of a report passes through here, on its way from a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minisgl.profiling.record import Record


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never in scientific notation; a dash for nothing."""
    if value is None:
        return "–"
    if value and abs(value) < 10 ** (digits - 1):
        return (
            f"{float(f'{value:.{digits}g}'):.6f}".rstrip("0").rstrip(".") if abs(value) < 1 else f"{value:.{digits}g}"
        )
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.0f}%" if abs(value) >= 0.0995 else f"{100 * value:.1f}%"


def spread(us: Mapping[str, float] | float | None) -> str:
    """A median with p10 and p90, where they are recorded."""
    if not isinstance(us, Mapping):
        return number(us)
    if "p10" not in us:
        return number(us["median"])
    return f"{number(us['median'])} ({number(us['p10'])}–{number(us['p90'])})"


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves few digits."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{number(num_bytes / scale)} {unit}"
    return f"{num_bytes:.0f} B"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; columns whose name ends in a colon hold words, the others numbers, to the right."""
    rule = ["---" if name.endswith(":") else "---:" for name in head]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [[name.rstrip(":") for name in head], rule, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(title: str, *parts: str, level: int = 2) -> str:
    """A heading and what stands below it."""
    return "\n\n".join(["#" * level + " " + title, *filter(None, parts)])


def missing(what: str, command: str) -> str:
    """What a section says that has no data."""
    return f"_Not measured: {what}._ `{command}` measures it."


def origin(record: Record) -> str:
    """Where the figures of a section come from."""
    quick = " A quick run: few sizes and samples, to see that it works." if record.quick else ""
    load, cores = record.hardware.get("load", 0.0), record.hardware.get("num_cores", 1)
    busy = f" The machine was busy: load {load:g} on {cores} cores as the run began." if load > cores else ""
    day = record.time[:16].replace("T", " ")
    return f"_{record.hardware['name']}, commit `{record.commit}`, {day} UTC._{quick}{busy}"


def skipped(record: Record) -> str:
    """What the run left out, and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for note in record.skipped:
        reasons.setdefault(note["why"], []).append(note["what"])
    return "\n".join(f"- Left out: {', '.join(what)}: {why}." for why, what in reasons.items())


def words(values: Sequence[str]) -> str:
    """'a, b and c'."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}" if values else ""


def lookup(record: Record | None, *path: str) -> Any:
    """A value of a record's summary, or None."""
    found: Any = None if record is None else record.summary
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
