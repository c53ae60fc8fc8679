"""Whether stated figures can be true: efficiency is computed from bytes and time, and held against what is stated.

Each check is arithmetic that any set of figures must survive; none knows a figure by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from minisgl.profiling.expected import Figure, Range, Reference, Sum

Severity = Literal["impossible", "inconsistent", "ambiguous"]
SLACK = 0.15  # figures are rounded: two that differ by less agree
_MOST_SLACK_FRACTION = 0.25  # of a share of a peak, which is rounded more coarsely


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a figure.

    Args:
        severity: impossible (exceeds what the hardware can), inconsistent (contradicts another figure of its set),
            ambiguous (true or not by how one counts).
    """

    figure: str
    severity: Severity
    text: str


def check_reference(reference: Reference) -> list[Finding]:
    """Everything in the set that can't be, the worst first."""
    found = [finding for figure in reference.figures for finding in _check_figure(figure, reference.ceiling(figure))]
    found += [finding for total in reference.sums for finding in _check_sum(total, reference)]
    order: list[Severity] = ["impossible", "inconsistent", "ambiguous"]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def computed_gbps(figure: Figure) -> Range | None:
    """GB/s by the figure's own bytes and time; None if it lacks either, or gives only a bound."""
    if figure.bytes is None or figure.us is None or not figure.us[0]:
        return None
    return figure.bytes / figure.us[1] / 1e3, figure.bytes / figure.us[0] / 1e3


def _check_figure(figure: Figure, ceiling: float | None) -> Iterator[Finding]:
    gbps = computed_gbps(figure)
    if gbps is not None and ceiling is not None and gbps[0] > ceiling:
        text = f"{figure.bytes:,} bytes in {_span(figure.us)} µs are {_span(gbps)} GB/s, and {ceiling:,.0f} is the most"
        yield Finding(figure.id, "impossible", text)
        return  # its share of the ceiling is as wrong
    yield from _check_fraction(figure, gbps or figure.gbps, ceiling)
    if gbps is not None and figure.gbps is not None:
        yield from _check_counting(figure, gbps, figure.gbps)


def _check_fraction(figure: Figure, gbps: Range | None, ceiling: float | None) -> Iterator[Finding]:
    if gbps is None or ceiling is None or figure.fraction is None:
        return
    share = gbps[0] / ceiling, gbps[1] / ceiling
    if _apart(share, figure.fraction, _MOST_SLACK_FRACTION):
        stated = f" ({_span(figure.gbps)} as stated)" if figure.gbps else ""
        text = (
            f"{_percent(figure.fraction)} of {ceiling:,.0f} GB/s is stated, but its bytes and time give {_span(gbps)} "
            f"GB/s{stated}, {_percent(share)}"
        )
        if figure.bytes is not None and share[1] < 0.5:
            text += (
                f"; the bytes need {figure.bytes / ceiling / 1e3:.2f} µs at that rate, so the launch binds, not memory"
            )
        yield Finding(figure.id, "inconsistent", text)


def _check_counting(figure: Figure, gbps: Range, stated: Range) -> Iterator[Finding]:
    if not _apart(gbps, stated, SLACK):
        return
    for factor in (2.0, 0.5):
        recounted = gbps[0] * factor, gbps[1] * factor
        if not _apart(recounted, stated, SLACK):
            text = (
                f"{figure.bytes:,} bytes, read and written, in {_span(figure.us)} µs are {_span(gbps)} or "
                f"{_span(recounted)} GB/s by how one counts; {_span(stated)} is stated"
            )
            yield Finding(figure.id, "ambiguous", text)
            return
    text = f"{_span(stated)} GB/s is stated, but {figure.bytes:,} bytes in {_span(figure.us)} µs are {_span(gbps)}"
    yield Finding(figure.id, "inconsistent", text)


def _check_sum(total: Sum, reference: Reference) -> Iterator[Finding]:
    whole = reference.figure(total.whole)
    parts = [(reference.figure(id).us, times) for id, times in total.parts.items()]
    added = tuple(sum((us or (0, 0))[end] * times for us, times in parts) for end in (0, 1))
    if whole.us is not None and added[0] > whole.us[1] * (1 + SLACK):
        text = f"{_span(whole.us)} µs is stated, but its parts add up to {_span((added[0], added[1]))}"
        yield Finding(whole.id, "inconsistent", text)


def _apart(a: Range, b: Range, slack: float) -> bool:
    """Whether two ranges miss each other by more than `slack` of the larger."""
    return a[1] * (1 + slack) < b[0] or b[1] * (1 + slack) < a[0]


def _span(values: Range | None) -> str:
    assert values is not None
    low, high = (f"{value:,.0f}" if value >= 10 else f"{value:.3g}" for value in values)
    return low if low == high else f"{low}–{high}"


def _percent(share: Range) -> str:
    low, high = (f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.1f}" for value in share)
    return f"{low}%" if low == high else f"{low}–{high}%"
