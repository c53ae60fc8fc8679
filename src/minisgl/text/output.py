"""From the engine's tokens to what a client sees: text, stop strings, the end of a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minisgl.messages import TokenOutput
from minisgl.text.detokenizer import Detokenizer, make_detokenizer
from minisgl.text.stop import StopMatcher
from minisgl.text.tokenizer import Tokenizer
from minisgl.types import FinishReason, RequestError, SamplingParams, TextDelta


class OutputProcessor:
    """Turns token outputs into text deltas for all requests in flight, and alone emits each request's last one.

    A stop string is found here, after the engine has gone on: its id is reported so that the engine can `finish` it,
    and tokens that still come are dropped uncounted.

    Args:
        tokenizer: None for a model without one; deltas then carry ids and no text.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[str, _Stream] = {}

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._streams)

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Starts a request. `params` are resolved: the model's end-of-text ids are among the stop ids.

        Raises:
            RequestError: stop strings for a model without a tokenizer.
        """
        assert request_id not in self._streams, f"request {request_id} is in flight already"
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = make_detokenizer(self._tokenizer, prompt_ids, params.skip_special_tokens)
        elif params.stop:
            raise RequestError(
                "this model has no tokenizer, so stop strings can't be found; use stop_token_ids", "stop"
            )
        self._streams[request_id] = _Stream(request_id, params, detokenizer, StopMatcher(params.stop), len(prompt_ids))

    def process(self, outputs: Iterable[TokenOutput]) -> tuple[list[TextDelta], list[str]]:
        """One delta for each output of a request in flight, and the ids that a stop string ended ahead of the engine.

        A delta holds the ids and log-probabilities counted with it; text may follow in a later delta when it ends
        inside a character or may begin a stop string.
        """
        deltas: list[TextDelta] = []
        stopped: list[str] = []
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is None:  # ended by a stop string or an abort while this was on its way
                continue
            delta = stream.advance(output)
            if delta.finish_reason is not None:
                del self._streams[output.id]
                if output.finish is None:
                    stopped.append(output.id)
            deltas.append(delta)
        return deltas, stopped

    def abort(self, request_id: str) -> TextDelta | None:
        """Ends a request here and now, with the text held back; None if it has ended. Tell the engine as well."""
        stream = self._streams.pop(request_id, None)
        return None if stream is None else stream.advance(TokenOutput(request_id, [], finish=FinishReason.ABORT))


@dataclass(slots=True)
class _Stream:
    """One request in flight."""

    id: str
    params: SamplingParams
    detokenizer: Detokenizer | None
    matcher: StopMatcher
    num_prompt: int
    num_cached: int = 0
    num_output: int = 0

    def advance(self, output: TokenOutput) -> TextDelta:
        """What `output` adds; its `finish_reason` is set if the request ends with it."""
        before = self.num_output
        if output.num_cached > self.num_cached:
            self.num_cached = output.num_cached
        stop_id = self._stop_id(output) if output.finish is not None else None
        text, stop = self._read(output.tokens if stop_id is None else output.tokens[:-1])
        if stop is None and stop_id is not None:
            self.num_output += 1
        if stop is None and output.finish is not None:
            tail, stop = self._flush()
            text += tail
        counted = self.num_output - before
        return TextDelta(
            self.id, text, token_ids=output.tokens[:counted], logprobs=output.logprobs[:counted],
            prompt_logprobs=output.prompt_logprobs, error=output.error,
            finish_reason=output.finish if stop is None else FinishReason.STOP,
            stop_reason=stop_id if stop is None else stop,
            num_prompt=self.num_prompt, num_cached=self.num_cached, num_output=self.num_output,
        )  # fmt: skip

    def _stop_id(self, output: TokenOutput) -> int | None:
        """The id that ended the request; it is counted, but isn't part of the text."""
        if output.finish is not FinishReason.STOP or not output.tokens:
            return None
        last = output.tokens[-1]
        return last if last in self.params.stop_token_ids else None

    def _read(self, tokens: Iterable[int]) -> tuple[str, str | None]:
        """Text of `tokens` up to the first stop string, and that string; counts the tokens read."""
        text = ""
        for token in tokens:
            self.num_output += 1
            new, stop = self._match(self.detokenizer.push((token,)) if self.detokenizer else "")
            text += new
            if stop is not None:
                return text, stop
        return text, None

    def _flush(self) -> tuple[str, str | None]:
        """Text held back, up to a stop string that its last part may complete."""
        text, stop = self._match(self.detokenizer.flush() if self.detokenizer else "")
        return (text, stop) if stop is not None else (text + self.matcher.flush(), None)

    def _match(self, text: str) -> tuple[str, str | None]:
        """Stop strings count only when they end beyond the first `min_tokens` tokens, as end-of-text ids do."""
        return self.matcher.push(text, armed=self.num_output > self.params.min_tokens)
