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
        self._usage = _UsageCount(job)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._job
        with job.backend.client.generate(job.id, job.prompts, job.params, job.priority) as stream:
            answer = self._send_events(stream, send) if job.stream else self._send_whole(stream, send)
            await until_disconnect(receive, answer)

    async def _send_whole(self, stream: Stream, send: Send) -> None:
        wholes: dict[int, TextDelta] = {}
        async for index, delta in stream:
            self._usage.add(index, delta)
            wholes[index] = merge(wholes[index], delta) if index in wholes else delta
        choices = [self._format.choice(i, whole) for i, whole in sorted(wholes.items())]
        body = msgspec.json.encode(self._answer(self._format.object, choices, self._usage.total()))
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
            self._usage.add(index, delta)
            for choice in self._format.chunks(index, delta):
                yield encoder.encode(self._answer(self._format.chunk_object, [choice], usage))
        if self._job.include_usage:
            yield encoder.encode(self._answer(self._format.chunk_object, [], self._usage.total()))
        yield b"[DONE]"

    async def _start(self, send: Send, content_type: bytes, header: tuple[bytes, bytes]) -> None:
        headers = [(b"content-type", content_type), (b"x-request-id", self._job.id.encode()), header]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def _answer(self, object: str, choices: list[Any], usage: Usage | None | msgspec.UnsetType) -> Answer:
        return Answer(self._job.id, object, self._created, self._job.model, choices, usage)


class _UsageCount:
    """Adds up what the sequences of a request used."""

    def __init__(self, job: Job) -> None:
        self._num_prompt = sum(len(prompt) for prompt in job.prompts)
        self._n = job.params.n
        self._cached: dict[int, int] = {}  # by prompt; its first answer counts
        self._output: dict[int, int] = {}  # by sequence

    def add(self, index: int, delta: TextDelta) -> None:
        self._output[index] = delta.num_output
        if index % self._n == 0:
            self._cached[index] = max(self._cached.get(index, 0), delta.num_cached)

    def total(self) -> Usage:
        completion = sum(self._output.values())
        details = PromptTokensDetails(sum(self._cached.values()))
        return Usage(self._num_prompt, completion, self._num_prompt + completion, details)


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
