"""A small HTTP/1.1 client for load tests: asyncio's own streams, a connection for each request, server-sent events.

It is our own because what is measured is when bytes arrive, with as little as possible between the socket and the
clock, and because a load client should be there wherever minisgl is.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from minisgl.types import ConfigError, MinisglError

_LINE_LIMIT = 1 << 20  # bytes of a header line
_ERROR_LIMIT = 1 << 20  # bytes read of a body that tells an error


class HttpError(MinisglError):
    """A request that got no answer, or an answer that is an error."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the API is: `http://host:port`, with or without `/v1`."""

    host: str
    port: int
    tls: bool
    path: str  # up to and with /v1
    api_key: str | None = None

    @staticmethod
    def parse(url: str, api_key: str | None = None) -> Endpoint:
        """
        Raises:
            ConfigError: no URL of a server.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ConfigError(f"url is {url!r}; expected something like http://127.0.0.1:1919")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that can't stand in an HTTP header")
        path = parts.path.rstrip("/")
        tls = parts.scheme == "https"
        path = path if path.endswith("/v1") else f"{path}/v1"
        return Endpoint(parts.hostname, port or (443 if tls else 80), tls, path, api_key)

    def head(self, method: str, path: str, length: int) -> bytes:
        """Request line and headers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "User-Agent: minisgl-bench",
            "Accept: text/event-stream, application/json",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            "Connection: close",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def get_json(endpoint: Endpoint, path: str) -> Any:
    """The body of a GET.

    Raises:
        HttpError: no answer, an error, or no JSON.
    """
    async with _exchange(endpoint, "GET", path, b"") as body:
        return _decode(b"".join([piece async for piece in body]))


async def post_events(endpoint: Endpoint, path: str, body: dict[str, Any]) -> AsyncGenerator[Any]:
    """Posts, and yields the data of each event as it arrives, decoded, up to `[DONE]`.

    Raises:
        HttpError: no answer, an error before or in the stream, or a stream that breaks off.
    """
    async with _exchange(endpoint, "POST", path, json.dumps(body).encode()) as pieces:
        events = Events()
        async for piece in pieces:
            for data in events.feed(piece):
                if data == b"[DONE]":
                    return
                event = _decode(data)
                if isinstance(event, dict) and event.get("error"):
                    raise HttpError(_message(event) or "an error without a message")
                yield event
    raise HttpError("the stream broke off before its end")


def _decode(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise HttpError(f"expected JSON, got {data[:60]!r}") from None


class Events:
    """Takes apart a stream of server-sent events, however it is cut into pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that `piece` completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        complete = []
        for line in lines:
            line = line.removesuffix(b"\r")
            field, _, value = line.partition(b":")
            if not line and self._data:
                complete.append(b"\n".join(self._data))
                self._data = []
            elif field == b"data":
                self._data.append(value.removeprefix(b" "))
        return complete


# -- HTTP ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _exchange(endpoint: Endpoint, method: str, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
    """Sends a request and yields the pieces of its answer's body, if its status is 200."""
    tls = ssl.create_default_context() if endpoint.tls else None
    writer = None
    try:
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=tls, limit=_LINE_LIMIT)
        writer.write(endpoint.head(method, path, len(body)) + body)
        await writer.drain()
        status, headers = await _read_head(reader)
        pieces = _read_body(reader, headers)
        if status != HTTPStatus.OK:
            raise HttpError(f"{status} {await _read_error(pieces)}".strip())
        yield pieces
    except (OSError, EOFError) as error:
        raise HttpError(_reason(error)) from None
    except (ValueError, asyncio.LimitOverrunError):
        raise HttpError("the server's answer is no valid HTTP") from None
    finally:
        if writer is not None:
            writer.close()


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the server closed the connection in the middle of an answer"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    while True:
        version, _, rest = (await _read_line(reader)).partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise HttpError("the server doesn't speak HTTP/1.1")
        status = int(rest[:3])
        headers: dict[bytes, bytes] = {}
        while line := await _read_line(reader):
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        if status >= HTTPStatus.OK:
            return status, headers


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\n")).rstrip(b"\r\n")
    except asyncio.IncompleteReadError as error:
        raise EOFError from error


async def _read_body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
    if headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked"):
        while size := int((await _read_line(reader)).partition(b";")[0] or b"0", 16):
            yield await reader.readexactly(size)
            await _read_line(reader)
    elif b"content-length" in headers:
        left = int(headers[b"content-length"])
        while left:
            piece = await reader.read(min(left, 1 << 16))
            if not piece:
                raise EOFError
            left -= len(piece)
            yield piece
    else:
        while piece := await reader.read(1 << 16):
            yield piece


async def _read_error(pieces: AsyncIterator[bytes]) -> str:
    """The message of an error's body, whatever its form."""
    data = b""
    async for piece in pieces:
        data += piece
        if len(data) > _ERROR_LIMIT:
            break
    try:
        return _message(json.loads(data)) or ""
    except ValueError:
        return data[:200].decode(errors="replace")


def _message(body: Any) -> str | None:
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return error if isinstance(error, str) else None
