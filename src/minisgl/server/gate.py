"""What stands between the network and the routes: time limits, the API key, the size of a body."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from minisgl.server.errors import HttpError, error_response
from minisgl.types import RequestError

MAX_BODY_BYTES = 8 * 2**20  # a million token ids and more; reading it holds up the streams for 0.2 s at most
OPEN_PATHS = frozenset({"/health"})  # need no key


class Connection(H11Protocol):
    """Cuts off a client that takes longer than `timeout` seconds to send a request, or lets an answer lie unread."""

    def __init__(self, *args: Any, timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeout = timeout
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start("read")

    def data_received(self, data: bytes) -> None:
        self._start("read")
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop("read")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("write")

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    def _start(self, name: str) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(self._timeout, self.transport.abort)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()


class Gate:
    """Reads a request's body before anybody works on it, and refuses what has no key or is too large."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                if scope["path"] not in OPEN_PATHS:
                    self._check_key(headers)
                receive = await _with_body(headers, receive)
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_key(self, headers: Headers) -> None:
        given = headers.get("authorization", "").encode("latin-1")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            text = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise HttpError(text, None, 401, "invalid_api_key")


async def _with_body(headers: Headers, receive: Receive) -> Receive:
    """`receive` with the whole body in its first message."""
    size, body, more = int(headers.get("content-length", 0)), bytearray(), True
    message: Message = {}
    while more and size <= MAX_BODY_BYTES:
        message = await receive()
        body += message.get("body", b"")
        size, more = max(size, len(body)), message.get("more_body", False)
    if size > MAX_BODY_BYTES:
        text = f"the body has more than {MAX_BODY_BYTES} bytes, as many as this server takes"
        raise HttpError(text, None, 413)
    first: list[Message] = [{**message, "body": bytes(body)}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
