"""What others say: reference figures and claims, as data with their source. Nothing here was measured by this project."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from minisgl.types import MinisglError

Range = tuple[float, float]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One figure of a reference; ranges are (low, high), both the same where it gives one value.

    Args:
        kind: of the record that holds the same of this machine; match: what its row must hold; summary: or the name of
            the value in its summary, in milliseconds or microseconds by its ending.
        gbps, fraction: bandwidth, and share of the ceiling, as stated.
        bytes: that move (each byte read and each written), or that a GPU sends over a link.
        ceiling: name of the reference's hardware figure that bounds it, in GB/s.
        also: what else it states, for the reader.
    """

    id: str
    what: str
    kind: str
    match: dict[str, Any] = {}
    summary: str = ""
    us: Range | None = None
    gbps: Range | None = None
    fraction: Range | None = None
    bytes: int | None = None
    ceiling: str | None = None
    also: dict[str, str] = {}


class Sum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure that others should add up to, each as many times as given."""

    whole: str
    parts: dict[str, int]


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A set of figures, where they come from, and what their hardware allows."""

    name: str
    source: str
    hardware: dict[str, float | str]
    figures: list[Figure]
    sums: list[Sum] = []

    def figure(self, id: str) -> Figure:
        return next(figure for figure in self.figures if figure.id == id)

    def ceiling(self, figure: Figure) -> float | None:
        """GB/s that bound the figure, if the reference says."""
        return None if figure.ceiling is None else float(self.hardware[figure.ceiling])


def references() -> list[str]:
    """The names of the sets that there are."""
    return sorted(path.stem(path) for path in files(__name__).iterdir())


@cache
def load_reference(name: str = "a100") -> Reference:
    """The set of that name.

    Raises:
        MinisglError: there is none; lists those that there are.
    """
    path = files(__name__) / f"{name}.json"
    if name not in references():
        raise MinisglError(f"there is no reference {name!r}; there are: {', '.join(references())}")
    return msgspec.json.decode(path.read_bytes(), type=Reference)
