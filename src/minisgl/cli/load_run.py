"""Sends the requests of a load test, at a rate or at a concurrency, and notes when what arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minisgl.cli.load_http import Endpoint, HttpError, post_events
from minisgl.cli.load_metrics import Sample
from minisgl.cli.load_prompts import Prompt, arrival_times

if TYPE_CHECKING:
    from minisgl.text import Tokenizer

Request = tuple[Prompt, int]  # and how many tokens to answer


@dataclass
class Client:
    """Asks one server, always in the same manner.

    Args:
        fields: of every request's body, beside the prompt and the length of the answer.
        tokenizer: counts the tokens of answers where the server doesn't say how many there were.
    """

    endpoint: Endpoint
    fields: dict[str, Any]
    chat: bool = False
    timeout: float = 600.0  # seconds, for a whole answer
    tokenizer: Tokenizer | None = None
    on_done: Callable[[], None] = lambda: None
    lateness: list[float] = field(default_factory=list)  # seconds by which requests started later than they were due

    async def ask(self, prompt: Prompt, max_tokens: int) -> Sample:
        """One request from its start to its end; what goes wrong is in the sample."""
        sample, text = Sample(time.perf_counter()), ""
        try:
            async with asyncio.timeout(self.timeout), aclosing(self._events(prompt, max_tokens)) as events:
                async for event in events:
                    text += take(sample, event, time.perf_counter())
            if not sample.end:
                raise HttpError("an answer without choices")
            if sample.output_tokens is None and self.tokenizer is not None:
                sample.output_tokens = len(self.tokenizer.encode(text, add_special_tokens=False))
        except HttpError as error:
            sample.error, sample.end = str(error), time.perf_counter()
        except TimeoutError:
            sample.error, sample.end = f"no end within {self.timeout:g} s", time.perf_counter()
        self.on_done()
        return sample

    def _events(self, prompt: Prompt, max_tokens: int) -> AsyncGenerator[Any]:
        said = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        body = {**said, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        path = "/chat/completions" if self.chat else "/completions"
        return post_events(self.endpoint, path, body | self.fields)

    async def at_rate(self, requests: Sequence[Request], rate: float, seed: int) -> list[Sample]:
        """An open loop: requests start when they are due, whatever became of those before them."""
        began = time.perf_counter()
        tasks = []
        for due, request in zip(arrival_times(len(requests), rate, seed), requests, strict=True):
            if (wait := began + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self.lateness.append(time.perf_counter() - began - due)
            tasks.append(asyncio.create_task(self.ask(*request)))
        return await asyncio.gather(*tasks)

    async def at_concurrency(self, requests: Sequence[Request], concurrency: int) -> list[Sample]:
        """A closed loop: so many requests under way, each followed by the next when it ends."""
        samples: list[Sample] = []
        queue = iter(requests)

        async def worker() -> None:
            for request in queue:
                samples.append(await self.ask(*request))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return samples


def take(sample: Sample, event: Any, now: float) -> str:
    """Notes in `sample` what an event of a stream brings; returns the text in it."""
    if not isinstance(event, dict):
        raise HttpError(f"expected an object in an event, got {type(event).__name__}")
    usage, choices = event.get("usage"), event.get("choices")
    if isinstance(usage, dict):
        sample.prompt_tokens, sample.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details")
        sample.cached_tokens = details.get("cached_tokens") if isinstance(details, dict) else None
    if not choices:
        return ""
    if not (isinstance(choices, list) and isinstance(choices[0], dict)):
        raise HttpError("an event whose choices are no list of objects")
    sample.end, choice = now, choices[0]
    said = choice.get("delta") or choice
    pieces = [said.get(name) for name in ("text", "reasoning_content", "reasoning", "content")]
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    if text or choice.get("logprobs") or choice.get("token_ids"):
        sample.times.append(now)
    return text
