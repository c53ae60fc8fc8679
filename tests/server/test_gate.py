"""The key, origins, sizes, and clients that send half a request or read nothing."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import KEY, Server, wait_until

MAX_BODY_BYTES = 8 * 2**20
BEARER = {"Authorization": f"Bearer {KEY}".encode()}
PATHS = ["/v1/models", "/v1/completions", "/tokenize", "/abort", "/metrics", "/openapi.json", "/docs", "/nothing"]


def post(server: Server, content: Any, path: str = "/v1/completions") -> httpx.Response:
    headers = BEARER | {"Content-Type": b"application/json"}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=30)


# -- the key and the origin ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_key_is_asked_of_every_path(fake: Server, path: str) -> None:
    response = httpx.get(fake.url + path)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("given", [KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer"])
def test_key_that_is_wrong_is_refused(fake: Server, given: str) -> None:
    assert httpx.get(f"{fake.url}/v1/models", headers={"Authorization": given.encode()}).status_code == 401


def test_key_opens_and_health_needs_none(fake: Server) -> None:
    assert httpx.get(f"{fake.url}/v1/models", headers=BEARER).status_code == 200
    assert fake.health().status_code == 200


def test_openai_client_without_the_key_gets_an_authentication_error(server: Server, fake: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        fake.client(api_key="sk-other").models.list()
    assert server.client(api_key="anything").models.list().data  # a server without a key takes any


def test_cors_lets_pages_of_the_origin_call(fake: Server) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    url = f"{fake.url}/v1/chat/completions"
    allowed = httpx.options(url, headers={"Origin": "https://b.example", **ask})  # a browser sends no key with it
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://b.example"
    refused = httpx.options(url, headers={"Origin": "https://evil.example", **ask})
    assert "Access-Control-Allow-Origin" not in refused.headers
    error = httpx.get(f"{fake.url}/v1/models", headers={"Origin": "https://a.example"})
    assert error.status_code == 401
    assert error.headers["Access-Control-Allow-Origin"] == "https://a.example"  # so that the page can read it


def test_cors_is_off_unless_asked_for(server: Server) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://a.example"})
    assert "Access-Control-Allow-Origin" not in response.headers


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_body_of_20_mb_is_413_and_the_connection_lives_on(fake: Server) -> None:
    headers = BEARER | {"Content-Type": b"application/json"}
    with httpx.Client(base_url=fake.url, headers=headers, timeout=30) as http:
        response = http.post("/v1/completions", content=json.dumps({"prompt": "x" * 20_000_000}))
        assert response.status_code == 413
        assert str(MAX_BODY_BYTES) in response.json()["error"]["message"]
        assert http.get("/v1/models").status_code == 200


def test_body_without_a_length_is_cut_off_at_the_limit(fake: Server) -> None:
    assert post(fake, iter([b"x" * 2**20] * 20)).status_code == 413


def test_body_within_the_limit_is_served(fake: Server) -> None:
    body = json.dumps({"prompt": [1], "max_tokens": 1, "user": "x" * (MAX_BODY_BYTES - 100)})
    assert post(fake, body).status_code == 200


# -- clients without an end ----------------------------------------------------------------------------------------


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
HALVES = {  # what 1,000 clients begin with
    "nothing": b"",
    "half a line": b"POST /v1/comp",
    "half a head": HEAD,
    "half a body": HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{",
    "half a body, refused": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
}


@contextlib.contextmanager
def open_files(number: int) -> Iterator[None]:
    """Room for so many more file descriptors in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, number + 1000)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(server: Server, data: bytes = b"") -> socket.socket:
    url = httpx.URL(server.url)
    connection = socket.create_connection((url.host, url.port), timeout=30)
    connection.sendall(data)
    return connection


def num_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def test_thousand_half_requests_hold_up_nobody_and_are_cut_off(fake: Server) -> None:
    before = num_files(fake)
    with open_files(1000), contextlib.ExitStack() as stack:
        halves = list(HALVES.values())
        start = time.monotonic()
        connections = [stack.enter_context(connect(fake, halves[i % len(halves)])) for i in range(1000)]
        answer = post(fake, json.dumps({"prompt": "A", "max_tokens": 3}))
        assert answer.json()["choices"][0]["text"] == "AAA"
        assert time.monotonic() - start < 60
        for connection in connections:
            _read_to_end(connection)
        assert 1 < time.monotonic() - start < 60
    wait_until(lambda: num_files(fake) <= before + 1)
    assert fake.health().json().get("open_requests", 0) == 0


def test_half_a_second_request_has_as_long_as_an_idle_connection_at_most(fake: Server) -> None:
    with connect(fake, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"lt")
        start = time.monotonic()
        _read_to_end(connection)
        assert 0.5 < time.monotonic() - start < 60


def test_request_that_arrives_bit_by_bit_is_served(fake: Server) -> None:
    body = b'{"prompt": "A", "max_tokens": 3}'
    request = HEAD + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(fake) as connection:
        for i in range(0, len(request), 20):
            connection.sendall(request[i : i + 20])
            time.sleep(0.01)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def _read_to_end(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(10_000):
            pass


@pytest.mark.parametrize("stream", [False, True])
def test_reader_that_reads_nothing_is_cut_off_and_holds_back_nobody(fake: Server, stream: bool) -> None:
    fields = {"prompt": [32] * 90_000, "n": 4, "max_tokens": 10**5, "echo": True, "logprobs": 0, "stream": stream}
    body = json.dumps(fields if stream else fields | {"max_tokens": 0}).encode()  # megabytes, or an endless stream
    head = HEAD + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        lazy = socket.socket()
        stack.enter_context(lazy)
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = httpx.URL(fake.url)
        lazy.connect((url.host, url.port))
        lazy.sendall(head + body)
        time.sleep(0.5)
        assert post(fake, json.dumps({"prompt": "A", "max_tokens": 100})).json()["choices"][0]["text"] == "A" * 100
        wait_until(lambda: not _established(fake, lazy))
    wait_until(lambda: fake.counts()["num_running"] == 0 and fake.health().json().get("open_requests", 0) == 0)


def _established(server: Server, connection: socket.socket) -> bool:
    """Whether the server's side of `connection` is open."""
    port = f"{connection.getsockname()[1]:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    server_port = f"{connection.getpeername()[1]:04X}"
    return any(row[1].endswith(f":{server_port}") and row[2].endswith(f":{port}") and row[3] == "01" for row in rows)
