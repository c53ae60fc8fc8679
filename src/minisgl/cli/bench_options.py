"""What the benchmarks' options have in common."""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Range(NamedTuple):
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int


def length_range(text: str) -> Range:
    """`100:1024`, or one number for both ends; for `type=` of an option."""
    return _range(text, 1)


def id_range(text: str) -> Range:
    """The same, from 0."""
    return _range(text, 0)


def _range(text: str, lowest: int) -> Range:
    low, _, high = text.partition(":")
    try:
        found = Range(int(low), int(high or low))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number, or two as in 100:1024") from None
    if not lowest <= found.low <= found.high:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers from {lowest}, the smaller one first")
    return found
