"""The load client, from raw bytes: HTTP, events, what a sample notes, open and closed loops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.cli.load_http import Endpoint, Events, HttpError, get_json, post_events
from minisgl.cli.load_metrics import Sample
from minisgl.cli.load_run import Client
from minisgl.types import ConfigError

# -- events --------------------------------------------------------------------------------------------------------

STREAM = b': hello\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b":\ndata: 2}\nid: 3\n\n\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    events, found = Events(), []
    for start, end in pairwise(places):
        found += events.feed(STREAM[start:end])
    assert found == EVENTS


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:1919", ("127.0.0.1", 1919, False, "/v1")),
        ("localhost:80/v1/", ("localhost", 80, False, "/v1")),
        ("https://api.example.com/openai", ("api.example.com", 443, True, "/openai/v1")),
        ("http://[::1]:8000", ("::1", 8000, False, "/v1")),
    ],
)
def test_endpoint_of_a_url(url: str, expected: tuple[str, int, bool, str]) -> None:
    endpoint = Endpoint.parse(url)
    assert (endpoint.host, endpoint.port, endpoint.tls, endpoint.path) == expected


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "http://x:y", ""])
def test_endpoint_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected something like"):
        Endpoint.parse(url)


def test_api_key_must_fit_into_a_header() -> None:
    with pytest.raises(ConfigError, match="API key"):
        Endpoint.parse("http://x", "secret\r\nHost: y")


# -- HTTP, from a server that says what it is told to --------------------------------------------------------------


class RawServer:
    """Answers every connection with `pieces`, one write each; keeps the requests, and how many came at once."""

    def __init__(self, *pieces: bytes, pause: float = 0.0) -> None:
        self.pieces, self.pause = pieces, pause
        self.requests: list[bytes] = []
        self.open = self.most_open = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        for piece in self.pieces:
            await asyncio.sleep(self.pause)
            writer.write(piece)
            await writer.drain()
        self.open -= 1
        writer.close()


@asynccontextmanager
async def serving(server: RawServer) -> AsyncIterator[Endpoint]:
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    async with listener:
        yield Endpoint.parse(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", "key")


def against(server: RawServer, work: Callable[[Endpoint], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with serving(server) as endpoint:
            return await asyncio.wait_for(work(endpoint), 20)

    return asyncio.run(run())


async def events_of(endpoint: Endpoint) -> list[Any]:
    return [event async for event in post_events(endpoint, "/completions", {"prompt": "x"})]


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
DATA = b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BODIES = {
    "chunks": CHUNKED + b"10\r\n" + DATA[:16] + b"\r\n1e;x=y\r\n" + DATA[16:] + b"\r\n0\r\n\r\n",
    "length": OK + b"Content-Length: 46\r\n\r\n" + DATA,
    "end of the connection": OK + b"\r\n" + DATA,
    "after 100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n" + DATA,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_stream_is_read_whatever_its_framing(name: str, size: int) -> None:
    assert len(DATA) == 46
    raw = BODIES[name]
    server = RawServer(*(raw[i : i + size] for i in range(0, len(raw), size)))
    assert against(server, events_of) == [{"a": 1}, {"b": 2}]
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer key" in head and json.loads(body) == {"prompt": "x"}


def test_json_is_got() -> None:
    server = RawServer(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}')
    assert against(server, lambda endpoint: get_json(endpoint, "/models")) == {"a": 1}
    assert server.requests[0].startswith(b"GET /v1/models HTTP/1.1\r\n")


ERRORS = {
    "status with OpenAI's error": (
        b'HTTP/1.1 400 Bad Request\r\nContent-Length: 35\r\n\r\n{"error": {"message": "no such x"}}',
        "400 no such x",
    ),
    "status with a text": (b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>oops", "502 <html>oops"),
    "error in the stream": (OK + b'\r\ndata: {"a": 1}\n\ndata: {"error": {"message": "died"}}\n\n', "died"),
    "stream that breaks off": (OK + b'\r\ndata: {"a": 1}\n\n', "broke off before its end"),
    "chunk that breaks off": (CHUNKED + b"ff\r\ndata", "closed the connection"),
    "length that isn't reached": (OK + b"Content-Length: 99\r\n\r\n" + DATA[:20], "closed the connection"),
    "nothing": (b"", "closed the connection"),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n\r\n", "doesn't speak HTTP/1.1"),
    "chunk without a length": (CHUNKED + b"zz\r\n", "no valid HTTP"),
    "endless header": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 21), "no valid HTTP"),
    "event that is no JSON": (OK + b"\r\ndata: {oops\n\n", "expected JSON, got b'{oops'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_goes_wrong_is_told(name: str) -> None:
    raw, reason = ERRORS[name]
    with pytest.raises(HttpError) as info:
        against(RawServer(raw), events_of)
    assert reason in str(info.value)


def test_no_server_is_told() -> None:
    with pytest.raises(HttpError, match=r"[Cc]onnect"):
        asyncio.run(events_of(Endpoint.parse("http://127.0.0.1:9")))


# -- the client ----------------------------------------------------------------------------------------------------


def chunk(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


# As OpenAI words it: a role without text, text, an end without text, usage without choices.
CHAT = [
    OK + b"\r\n" + chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
    chunk(choices=[{"index": 0, "delta": {"content": "Hel"}}]),
    chunk(choices=[{"index": 0, "delta": {"content": "lo"}}], usage=None),
    chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}]),
    chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}})
    + b"data: [DONE]\n\n",
]
NO_USAGE = [OK + b"\r\n" + chunk(choices=[{"text": "a"}]), chunk(choices=[{"text": "b"}]) + b"data: [DONE]\n\n"]


def ask(server: RawServer, **options: Any) -> Sample:
    sample: Sample = against(server, lambda endpoint: Client(endpoint, {"model": "m"}, **options).ask("hi", 5))
    return sample


def test_sample_of_a_chat() -> None:
    server = RawServer(*CHAT, pause=0.05)
    sample = ask(server, chat=True)
    assert sample.error is None
    assert (sample.prompt_tokens, sample.cached_tokens, sample.output_tokens) == (9, 4, 5)
    assert len(sample.times) == 2, "chunks without text are no tokens"
    assert sample.ttft is not None and 0.1 <= sample.ttft <= sample.e2e
    assert 0.2 <= sample.e2e and sample.end > sample.times[-1]
    assert sample.tpot == pytest.approx((sample.end - sample.times[0]) / 4)
    body = json.loads(server.requests[0].partition(b"\r\n\r\n")[2])
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_tokens_are_never_counted_from_chunks() -> None:
    sample = ask(RawServer(*NO_USAGE))
    assert sample.error is None and len(sample.times) == 2
    assert sample.output_tokens is None and sample.tpot is None


def test_tokenizer_counts_where_the_server_does_not() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [0] * len(text) * 3

    assert ask(RawServer(*NO_USAGE), tokenizer=Letters()).output_tokens == 6


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([OK + b"\r\ndata: [DONE]\n\n"], "without choices"),
        ([OK + b"\r\ndata: [1]\n\n"], "expected an object"),
        ([OK + b"\r\n" + chunk(choices=[3])], "choices are no list of objects"),
        ([OK + b"\r\n", b"late"], "no end within 0.2 s"),
    ],
)
def test_answer_that_is_none_is_an_error_of_the_sample(pieces: list[bytes], reason: str) -> None:
    sample = ask(RawServer(*pieces, pause=0.4 if len(pieces) > 1 else 0), timeout=0.2 if len(pieces) > 1 else 9)
    assert sample.error is not None and reason in sample.error
    assert sample.end > sample.start


def test_closed_loop_keeps_its_concurrency() -> None:
    server = RawServer(*NO_USAGE, pause=0.02)
    requests = [("x", 1)] * 12
    samples = against(server, lambda endpoint: Client(endpoint, {}).at_concurrency(requests, 3))
    assert len(samples) == 12 and all(s.error is None for s in samples)
    assert server.most_open == 3


def test_open_loop_waits_for_no_answer() -> None:
    server = RawServer(*NO_USAGE, pause=2)
    requests = [("x", 1)] * 10
    client = Client(Endpoint.parse("http://x"), {})

    async def work(endpoint: Endpoint) -> list[Sample]:
        client.endpoint = endpoint
        return await client.at_rate(requests, 100.0, seed=1)

    samples = against(server, work)
    assert server.most_open == 10
    started = [s.start - samples[0].start for s in samples]
    assert started[-1] < 2, "the last was sent before the first was answered"
    assert len(client.lateness) == 10 and min(client.lateness) >= 0
