"""Stop strings against a definition that looks at the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minisgl.text.stop import StopMatcher

TEXT = st.text(alphabet="ab", max_size=20)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: list[str], armed_from: int = 0) -> tuple[str, str | None]:
    """`text` up to the stop string that is complete first, beyond its first `armed_from` characters."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def may_begin_a_stop(text: str, stops: list[str]) -> int:
    """Characters at the end of `text` that a stop string may begin with."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


@given(pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12), stops=STOPS, num_unarmed=st.integers(0, 3))
def test_matcher_cuts_where_the_definition_does_and_leaks_nothing(pieces, stops, num_unarmed) -> None:
    expected, stop = cut("".join(pieces), stops, len("".join(pieces[:num_unarmed])))
    matcher, passed, seen, found = StopMatcher(stops), "", "", None
    for i, piece in enumerate(pieces):
        new, found = matcher.push(piece, armed=i >= num_unarmed)
        passed, seen = passed + new, seen + piece
        assert expected.startswith(passed)
        if found is not None:
            break
        assert len(seen) - len(passed) == may_begin_a_stop(seen, stops)  # no more is held back than must be
    passed += matcher.flush()
    assert (passed, found) == (expected, stop)


@given(text=TEXT, stops=STOPS, cuts=st.sets(st.integers(0, 20)))
def test_matcher_result_does_not_depend_on_the_pieces(text, stops, cuts) -> None:
    ends = sorted({min(c, len(text)) for c in cuts} | {len(text)})
    matcher, passed, found, start = StopMatcher(stops), "", None, 0
    for end in ends:
        new, found = matcher.push(text[start:end])
        passed, start = passed + new, end
        if found is not None:
            break
    assert (passed + matcher.flush(), found) == cut(text, stops)


def test_matcher_passes_a_false_start_on() -> None:
    matcher = StopMatcher(["END!"])
    assert [matcher.push(piece)[0] for piece in ("x E", "N", "D", ".", "EN")] == ["x ", "", "", "END.", ""]
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""
