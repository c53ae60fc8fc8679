"""`Stream`: what the sequences of one HTTP request produce, for one reader."""

from __future__ import annotations

import asyncio

from minisgl.types import FinishReason, MinisglError, RequestError, TextDelta


class Stream:
    """Iterating yields (index of the sequence, what it gained), until every sequence has ended.

    What arrives while the reader is busy merges into one delta a sequence: a slow reader holds back nobody, and costs
    no more memory than the answer itself.

    Raises (from the iteration, once what came before is read):
        RequestError: the engine refused a sequence.
        MinisglError: whatever `fail` was given.
    """

    def __init__(self, num_sequences: int) -> None:
        self.open = set(range(num_sequences))
        self._pending: dict[int, TextDelta] = {}
        self._error: MinisglError | None = None
        self._wake = asyncio.Event()

    def put(self, index: int, delta: TextDelta) -> None:
        """Adds what sequence `index` gained."""
        if delta.finish_reason is not None:
            self.open.discard(index)
        if delta.finish_reason is FinishReason.ERROR:
            self.fail(RequestError(delta.error or "the engine could not go on with this request"))
            return
        waiting = self._pending.get(index)
        self._pending[index] = delta if waiting is None else merge(waiting, delta)
        self._wake.set()

    def fail(self, error: MinisglError) -> None:
        """Ends the iteration with `error`."""
        self._error = self._error or error
        self._wake.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, TextDelta]:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self.open:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        index = next(iter(self._pending))
        return index, self._pending.pop(index)


def merge(first: TextDelta, then: TextDelta) -> TextDelta:
    """`first`, changed in place to hold what `then` brought too."""
    first.text += then.text
    first.token_ids += then.token_ids
    first.logprobs += then.logprobs
    first.prompt_logprobs = first.prompt_logprobs or then.prompt_logprobs
    first.finish_reason, first.stop_reason = then.finish_reason, then.stop_reason
    first.num_cached = max(first.num_cached, then.num_cached)
    first.num_prompt, first.num_output = then.num_prompt, then.num_output
    return first
