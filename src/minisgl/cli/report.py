"""What one answer was, and how long its tokens took."""

from __future__ import annotations

import time
from typing import Any

from minisgl.types import TextDelta


class Report:
    """Collects the pieces of an answer. Times are seconds since this object was made; none unless `timed`."""

    def __init__(self, timed: bool = True) -> None:
        self.text = ""
        self.last = TextDelta("")  # the newest piece: counts so far, and in the end the reason of the end
        self.first: float | None = None  # when the first token came
        self.end = 0.0  # when the newest piece came
        self._timed, self._start = timed, time.perf_counter()

    def add(self, delta: TextDelta) -> None:
        self.end = time.perf_counter() - self._start
        if self._timed and self.first is None and delta.num_output:
            self.first = self.end
        self.text += delta.text
        self.last = delta

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first token; None if there was but one."""
        if self.first is None or self.last.num_output < 2:
            return None
        return (self.last.num_output - 1) / max(self.end - self.first, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "finish_reason": self.last.finish_reason,
            "prompt_tokens": self.last.num_prompt,
            "output_tokens": self.last.num_output,
            "time_to_first_token": self.first,
            "tokens_per_second": self.rate,
        }

    def line(self) -> str:
        """The figures in one line."""
        cached = f" ({self.last.num_cached} cached)" if self.last.num_cached else ""
        line = f"{self.last.num_prompt} prompt tokens{cached}, {self.last.num_output} output tokens"
        if self.first is not None:
            line += f", first token after {self.first:.2f} s"
        if self.rate is not None:
            line += f", then {self.rate:.1f} tokens/s"
        return line
