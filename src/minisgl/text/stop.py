"""Finding stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string is complete; holds back what may be the start of one.

    The string that is complete first wins; of two that are complete with the same character, the longer. So the
    result doesn't depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """The text that is free to go, and the stop string found.

        Args:
            text: new text.
            armed: whether a stop string that `text` completes counts; if not, it passes as text.
        """
        if not self._stops:
            return text, None
        held, scan = len(self._held), self._held + text
        if armed and text:
            places = ((scan.find(stop, max(0, held - len(stop) + 1)), stop) for stop in self._stops)
            if found := [(at + len(stop), at, stop) for at, stop in places if at >= 0]:
                _, at, stop = min(found)
                self._held = ""
                return scan[:at], stop
        free = len(scan) - max(_overlap(scan, stop) for stop in self._stops)
        self._held = scan[free:]
        return scan[:free], None

    def flush(self) -> str:
        """The text held back; call it at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, but not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
