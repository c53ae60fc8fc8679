"""The parts of the load client: HTTP and events from raw bytes, arithmetic on known timings, prompts and arrivals."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.cli.bench_options import Range
from minisgl.cli.load_http import Endpoint, Events, HttpError, get_json, post_events
from minisgl.cli.load_metrics import Sample, parse_goals, percentile, summarise
from minisgl.cli.load_prompts import Plan, arrival_times, draw_requests
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
    assert sample.ttft is not None and 0.1 <= sample.ttft < 1
    assert 0.2 <= sample.e2e < 1 and sample.end > sample.times[-1]
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
    server = RawServer(*NO_USAGE, pause=0.3)
    requests = [("x", 1)] * 10
    client = Client(Endpoint.parse("http://x"), {})

    async def work(endpoint: Endpoint) -> list[Sample]:
        client.endpoint = endpoint
        return await client.at_rate(requests, 100.0, seed=1)

    samples = against(server, work)
    assert server.most_open == 10
    started = [s.start - samples[0].start for s in samples]
    assert started == pytest.approx(arrival_times(10, 100.0, 1), abs=0.05)
    assert max(client.lateness) < 0.05


# -- arithmetic ----------------------------------------------------------------------------------------------------

# Three requests on one clock: the second one slow, the third one failed.
RECORDED = [
    Sample(10.0, [10.2, 10.3, 10.4, 10.6], 10.6, prompt_tokens=100, cached_tokens=50, output_tokens=5),
    Sample(10.5, [11.5, 12.5], 12.5, prompt_tokens=200, cached_tokens=0, output_tokens=3),
    Sample(11.0, [], 11.1, error="503 busy"),
]


def test_summary_of_recorded_timings() -> None:
    summary = summarise(RECORDED, {"ttft": 0.3, "tpot": 0.2})
    assert (summary["requests"], summary["failed"], summary["errors"]) == (3, 1, {"503 busy": 1})
    assert summary["seconds"] == 2.5  # from 10.0 to 12.5
    assert summary["requests_per_second"] == 2 / 2.5
    assert summary["output_tokens_per_second"] == 8 / 2.5
    assert summary["tokens_per_second"] == 308 / 2.5
    assert (summary["prompt_tokens"], summary["cached_tokens"], summary["output_tokens"]) == (300, 50, 8)
    assert summary["tokens_per_chunk"] == round(8 / 6, 3)
    assert summary["ttft_ms"] == {"mean": 600, "median": 600, "p90": 920, "p99": 992}  # 200 and 1000
    assert summary["tpot_ms"] == {"mean": 300, "median": 300, "p90": 460, "p99": 496}  # 400/4 and 1000/2
    assert summary["itl_ms"] == {"mean": 350, "median": 150, "p90": 760, "p99": 976}  # 100, 100, 200, 1000
    assert summary["e2e_ms"] == {"mean": 1300, "median": 1300, "p90": 1860, "p99": 1986}  # 600 and 2000
    assert summary["goodput"] == {
        "goals_ms": {"ttft": 300, "tpot": 200},
        "requests_per_second": 1 / 2.5,
        "fraction": 0.3333,
    }


def test_summary_without_usage_has_no_token_figures() -> None:
    summary = summarise([Sample(0.0, [1.0, 2.0], 2.0)], {})
    assert summary["output_tokens"] is summary["output_tokens_per_second"] is summary["tokens_per_second"] is None
    assert summary["tpot_ms"] is None and summary["ttft_ms"]["median"] == 1000
    assert "goodput" not in summary


def test_answer_of_one_token_has_no_time_between_tokens() -> None:
    sample = Sample(0.0, [1.0], 1.0, output_tokens=1)
    assert sample.tpot is None and sample.itl == []
    assert sample.meets({"ttft": 1.0, "tpot": 0.001, "e2e": 1.0}) and not sample.meets({"ttft": 0.9})


def test_failed_request_meets_no_goal() -> None:
    assert not Sample(0.0, [0.1], 0.1, error="x").meets({"e2e": 9.0})


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    assert percentile(ordered, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


def test_goals_are_milliseconds() -> None:
    assert parse_goals(["ttft:200", "tpot:50.5"]) == {"ttft": 0.2, "tpot": 0.0505}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "ttft:inf", "itl:3", "ttft:nan"])
def test_goals_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected ttft, tpot, e2e"):
        parse_goals([text])


# -- prompts and arrivals ------------------------------------------------------------------------------------------


def test_requests_are_drawn_within_their_ranges_and_again_by_their_seed() -> None:
    plan = Plan(200, Range(3, 9), Range(1, 4), token_ids=Range(5, 8), seed=2)
    requests = draw_requests(plan)
    assert {len(prompt) for prompt, _ in requests} == set(range(3, 10))
    assert {n for _, n in requests} == {1, 2, 3, 4}
    assert {token for prompt, _ in requests for token in prompt} == {5, 6, 7, 8}
    assert draw_requests(plan) == requests != draw_requests(Plan(200, Range(3, 9), Range(1, 4), seed=3))


def test_prefixes_are_shared_by_groups() -> None:
    requests = draw_requests(Plan(50, Range(4, 4), Range(1, 1), shared_prefix=20, prefix_groups=3))
    assert {len(prompt) for prompt, _ in requests} == {24}
    assert len({tuple(prompt[:20]) for prompt, _ in requests}) == 3
    assert len({tuple(prompt[20:]) for prompt, _ in requests}) == 50


def test_text_prompts_are_words() -> None:
    requests = draw_requests(Plan(5, Range(7, 7), Range(1, 1), shared_prefix=3, text=True))
    assert {len(prompt.split()) for prompt, _ in requests if isinstance(prompt, str)} == {10}


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(20_000, 50.0, seed=0)
    gaps = np.diff(times)
    assert times[0] == 0 and gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03), "exponential gaps deviate by their mean"
    assert np.mean(gaps > 1 / 50) == pytest.approx(np.exp(-1), abs=0.01)
    assert arrival_times(3, float("inf"), seed=0) == [0.0, 0.0, 0.0]
