"""How a server starts, fails and ends: real processes, real signals."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import CONTEXT, Server, alive, running, tiny_options, wait_until


@pytest.fixture(scope="module")
def slow_model(tiny_model: Path) -> Path:
    """Its name makes a fake engine take 10 ms a step."""
    link = tiny_model.with_name("slow")
    link.symlink_to(tiny_model)
    return link


@pytest.fixture
def fresh(slow_model: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of one's own with a fake engine, its sockets under `tmp_path`."""
    with running(*tiny_options(slow_model), env={"TMPDIR": str(tmp_path)}, fake=True) as server:
        yield server.wait_ready()


def story(client: openai.OpenAI, max_tokens: int = 4000) -> Any:
    """A stream of 40 seconds."""
    return client.completions.create(
        model="tiny", prompt="Once", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


# -- an engine that dies -------------------------------------------------------------------------------------------


def test_engine_killed_in_mid_stream_gives_clients_an_error_event(fresh: Server) -> None:
    with fresh.client() as client:
        stream = story(client)
        next(stream)
        os.kill(fresh.engine_pid(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"killed \(signal 9\)"):
            for _ in stream:
                pass
        health = fresh.health()
        assert health.status_code == 503
        assert health.json()["status"] == "failed"
        with pytest.raises(openai.InternalServerError) as info:
            story(client)
        assert info.value.status_code == 503
    assert fresh.exit_code() == 1
    assert "minisgl: error: the engine process was killed (signal 9)" in fresh.output
    assert "Traceback" not in fresh.output


def test_engine_killed_before_an_answer_gives_an_error_status(fresh: Server) -> None:
    os.kill(fresh.engine_pid(), signal.SIGSTOP)  # so that the request gets no answer
    with ThreadPoolExecutor() as pool:
        body = {"prompt": "Once", "max_tokens": 5}
        future = pool.submit(httpx.post, f"{fresh.url}/v1/completions", json=body, timeout=60)
        wait_until(lambda: fresh.health().json().get("open_requests") == 1)
        os.kill(fresh.engine_pid(), signal.SIGKILL)
        response = future.result()
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert "Retry-After" in response.headers
    assert fresh.exit_code() == 1


# -- the end -------------------------------------------------------------------------------------------------------


def test_sigterm_lets_answers_end_and_leaves_nothing_behind(fresh: Server, tmp_path: Path) -> None:
    engine = fresh.engine_pid()
    with fresh.client() as client:
        stream = story(client, max_tokens=100)
        next(stream)
        fresh.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    assert fresh.exit_code() == 0
    assert not alive(engine)
    assert list(tmp_path.glob("minisgl-*")) == []
    with pytest.raises(httpx.ConnectError):
        fresh.health()
    assert "Traceback" not in fresh.output


def test_second_sigterm_ends_answers_at_once(fresh: Server) -> None:
    with fresh.client() as client:
        stream = story(client)
        next(stream)
        os.kill(fresh.engine_pid(), signal.SIGSTOP)  # the answer would never end
        fresh.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert fresh.process.poll() is None
        fresh.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass
    assert fresh.exit_code() == 0
    assert "Traceback" not in fresh.output


def test_drain_has_an_end(slow_model: Path) -> None:
    with (
        running(*tiny_options(slow_model), "--drain-timeout", "1", fake=True) as server,
        server.wait_ready().client() as client,
    ):
        stream = story(client)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass
        assert server.exit_code() == 0


def test_sigint_to_the_whole_group_ends_cleanly(tiny_model: Path) -> None:
    with running(*tiny_options(tiny_model)) as server:
        server.wait_ready()
        engine = server.engine_pid()
        for pid in (engine, server.process.pid):  # as a terminal does
            os.kill(pid, signal.SIGINT)
        assert server.exit_code() == 0
        assert not alive(engine)
        assert "Traceback" not in server.output


def test_sigterm_while_loading_ends_cleanly(tiny_model: Path) -> None:
    port = free_port()
    with running(*tiny_options(tiny_model, port)) as server:
        server.url = f"http://127.0.0.1:{port}"
        _first_health(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "Traceback" not in server.output


def test_killed_server_takes_its_busy_engine_along(fresh: Server) -> None:
    engine = fresh.engine_pid()
    with fresh.client() as client:
        next(story(client))
        fresh.process.kill()
        wait_until(lambda: not alive(engine), timeout=10)


# -- the start -----------------------------------------------------------------------------------------------------


def test_health_is_503_until_ready(tiny_model: Path) -> None:
    port = free_port()
    with running(*tiny_options(tiny_model, port)) as server:
        server.url = f"http://127.0.0.1:{port}"
        first = _first_health(server)
        assert (first.status_code, first.json()["status"]) == (503, "starting")
        response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
        server.wait_ready()
        assert server.health().status_code == 200
        assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in server.output


def _first_health(server: Server) -> httpx.Response:
    answers: list[httpx.Response] = []

    def answered() -> bool:
        try:
            answers.append(server.health())
        except httpx.ConnectError:
            return False
        return True

    wait_until(answered)
    return answers[0]


def test_port_in_use_is_one_clear_line(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running(*tiny_options(tiny_model, port)) as server:
            assert server.exit_code() == 1
    [line] = server.output.splitlines()
    assert line.startswith(f"minisgl: error: can't listen on 127.0.0.1 port {port}: Address already in use")


def test_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    with running("--model", str(tmp_path / "nothing"), "--port", "0") as server:
        assert server.exit_code() == 1
    [line] = server.output.splitlines()
    assert line.startswith("minisgl: error: ")
    assert "nothing" in line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-model-len", str(CONTEXT + 1)], str(CONTEXT + 1)),
        (["--mem-fraction", "1e-9"], "no memory for a KV pool"),
        (["--model", "{folder}"], "model_type is 'starship'"),
    ],
)
def test_engine_that_cannot_start_says_so_in_one_line(
    tiny_model: Path, tmp_path: Path, options: list[str], text: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "starship", "architectures": ["Starship"]}')
    base = [option for option in tiny_options(tiny_model) if option not in ("--num-pages", "600")]
    with running(*base, *(option.format(folder=tmp_path) for option in options)) as server:
        assert server.exit_code() == 1
    errors = [line for line in server.output.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert text in errors[0]
    assert "Traceback" not in server.output


def test_full_queue_is_503_with_retry_after(slow_model: Path) -> None:
    with (
        running(*tiny_options(slow_model), "--max-queue", "1", fake=True) as server,
        server.wait_ready().client() as client,
    ):
        stream = story(client)
        next(stream)
        response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
        too_many = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "n": 2})
        assert too_many.status_code == 400
        stream.close()
        wait_until(lambda: server.counts()["num_running"] == 0)
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices[0].finish_reason
