"""What others say: reference figures and claims, as data with their source. None of it was measured here."""

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
        kind: of the record that holds the same of this machine; match: what its row must hold (a list: any of these);
            summary: or the name of the value in its summary, in milliseconds or microseconds by its ending.
        gbps, fraction: bandwidth, and share of the ceiling, as stated.
        bytes: that move (each byte read and each written), or that a GPU sends over a link.
        ceiling: name of the reference's hardware figure that bounds it, in GB/s.
        host: whether the host does this work, whatever computes the model.
        each: whether it is of one of several that a layer has.
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
    host: bool = False
    each: bool = False
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


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of a kernel; what isn't given is the kernel's own choice, and the sizes of its first benchmark."""

    kernel: str
    version: str | None = None
    case: dict[str, Any] = {}
    threads: int | None = None
    work: int | None = None
    pdl: bool | None = None


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One side of an A/B measurement: calls one after another, or a path that its experiment knows."""

    name: str
    calls: list[Call] = []
    path: str = ""


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A statement to rule on: how much faster B is than A, as time of A / time of B - 1.

    Args:
        gain: the least and the most that is claimed; None is no bound.
        experiment: the name of what measures it, in `experiments.py`; cases: sizes to measure it at.
        engine: what the engine makes of it, where that is settled.
    """

    id: str
    text: str
    gain: tuple[float | None, float | None]
    experiment: str
    a: Arm
    b: Arm
    cases: list[dict[str, Any]]
    engine: str = ""


@cache
def load_claims() -> list[Claim]:
    """All claims, in the order of the report."""
    return msgspec.json.decode((files(__name__) / "claims.json").read_bytes(), type=list[Claim])


def references() -> list[str]:
    """The names of the sets of figures that there are."""
    names = (path.name for path in files(__name__).iterdir())
    return sorted({name.removesuffix(".json") for name in names if name.endswith(".json")} - {"claims"})


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
