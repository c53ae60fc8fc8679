"""Answers a `Job`: one JSON object, or a stream of server-sent events. A client that goes away ends its request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisgl.server.errors import describe
from minisgl.server.formats import ChatFormat, CompletionFormat
from minisgl.server.jobs import Job
from minisgl.server.responses import Answer, PromptTokensDetails, Usage
from minisgl.server.stream import Stream, merge
from minisgl.timing import span
from minisgl.types import MinisglError, TextDelta


class GenerationResponse(Response):
    """Generates while it answers. Nothing is sent before the first output, so that a refusal still has its status.

    Raises (before anything was sent):
        RequestError, OverloadedError, EngineDeadError: for the app's error handlers.
    """

    def __init__(self, job: Job, form: ChatFormat | CompletionFormat) -> None:
        super().__init__()
        self._job = job
        self._format = form
        self._created = int(time.time())
        self._last: dict[int, TextDelta] = {}  # of each sequence; its counts are those of all so far

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._job
        with job.backend.client.generate(job.id, job.prompts, job.params, job.priority) as stream:
            answer = self._send_events(stream, send) if job.stream else self._send_whole(stream, send)
            await until_disconnect(receive, answer)

    async def _send_whole(self, stream: Stream, send: Send) -> None:
        async for index, delta in stream:
            self._last[index] = merge(self._last[index], delta) if index in self._last else delta
        choices = [self._format.choice(i, whole) for i, whole in sorted(self._last.items())]
        body = msgspec.json.encode(self._answer(self._format.object, choices, self._usage()))
        await self._start(send, b"application/json", (b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, stream: Stream, send: Send) -> None:
        started = False
        try:
            async for event in self._events(stream):
                if not started:
                    await self._start(send, b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"))
                    started = True
                await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        except MinisglError as error:
            if not started:
                raise
            event = msgspec.json.encode(describe(error)[1])
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, stream: Stream) -> AsyncIterator[bytes]:
        encoder = msgspec.json.Encoder()
        usage = None if self._job.include_usage else msgspec.UNSET
        async for index, delta in stream:
            self._last[index] = delta
            for choice in self._format.chunks(index, delta):
                with span("encode"):
                    event = encoder.encode(self._answer(self._format.chunk_object, [choice], usage))
                yield event
        if self._job.include_usage:
            yield encoder.encode(self._answer(self._format.chunk_object, [], self._usage()))
        yield b"[DONE]"

    async def _start(self, send: Send, content_type: bytes, header: tuple[bytes, bytes]) -> None:
        headers = [(b"content-type", content_type), (b"x-request-id", self._job.id.encode()), header]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def _usage(self) -> Usage:
        """What all sequences used; a prompt counts once, by its first answer."""
        prompts, n = sum(map(len, self._job.prompts)), self._job.params.n
        output = sum(delta.num_output for delta in self._last.values())
        cached = sum(delta.num_cached for index, delta in self._last.items() if index % n == 0)
        return Usage(prompts, output, prompts + output, PromptTokensDetails(cached))

    def _answer(self, object: str, choices: list[Any], usage: Usage | None | msgspec.UnsetType) -> Answer:
        return Answer(self._job.id, object, self._created, self._job.model, choices, usage)


async def until_disconnect(receive: Receive, work: Awaitable[None]) -> None:
    """Runs `work` to its end, or cancels it as soon as the client is gone."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
