"""The HTTP server in front of several ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from rank_world import LIMIT_S, PAGES, assert_gone, children, greedy
from servers import Server, alive, running, wait_until

from minisgl import LLM

TEXT = "Once upon a time"
OPTIONS = "--device cpu --page-size 8 --num-pages 60 --max-batched-tokens 64 --max-running 16 --port 0"


@pytest.fixture
def server(tp_model: Path, tmp_path: Path) -> Iterator[Server]:
    options = [*OPTIONS.split(), "--model", str(tp_model), "--served-model-name", "tiny", "--tp", "2"]
    with running(*options, env={"TMPDIR": str(tmp_path)}) as server:
        yield server.wait_ready()


def _answer(server: Server, num_tokens: int, prompt: str = TEXT) -> str:
    with server.client() as client:
        done = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=num_tokens, temperature=0, extra_body={"ignore_eos": True}
        )
    return done.choices[0].text


def test_server_with_two_ranks_answers_and_ends_without_a_trace(server: Server, tp_model: Path, tmp_path: Path) -> None:
    expected = LLM(str(tp_model), **PAGES).generate(TEXT, greedy(40))[0].text
    assert _answer(server, 40) == expected
    engine = server.engine_pid()
    pids = children(engine)
    assert len(pids) == 1
    for pid in (*pids, engine, server.process.pid):  # Ctrl-C, as a terminal hands it out
        os.kill(pid, signal.SIGINT)
    assert server.exit_code() == 0
    assert_gone([engine, *pids])
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in server.output


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_server_whose_rank_was_killed_says_so_and_ends(server: Server, tmp_path: Path, busy: bool) -> None:
    engine = server.engine_pid()
    [rank] = children(engine)
    with ThreadPoolExecutor() as pool:
        if busy:
            os.kill(rank, signal.SIGSTOP)  # so that rank 0 waits for it in a collective
            body = {"prompt": TEXT, "max_tokens": 5}
            future = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=LIMIT_S)
            wait_until(lambda: server.health().json().get("open_requests") == 1)
        os.kill(rank, signal.SIGKILL)
        if busy:
            response = future.result()
            assert response.status_code == 503
            assert "rank 1 was killed (signal 9)" in response.json()["error"]["message"]
    assert server.exit_code() == 1
    assert "minisgl: error: rank 1 was killed (signal 9)" in server.output
    assert "Traceback" not in server.output
    assert not alive(engine)
    assert not list(tmp_path.iterdir())


def test_killed_server_takes_all_ranks_along(server: Server) -> None:
    pids = [server.engine_pid()]
    pids += children(pids[0])
    assert len(pids) == 2
    server.process.kill()
    assert_gone(pids)


@pytest.mark.slow
def test_smollm2_is_served_by_three_ranks(smollm2: Path) -> None:
    """Nine heads, three key-value heads."""
    expected = LLM(str(smollm2), device="cpu", attention="torch_sdpa").generate(TEXT, greedy(24))[0].text
    with running(*OPTIONS.split(), "--model", "smollm2", "--served-model-name", "tiny", "--tp", "3") as server:
        server.wait_ready()
        assert len(children(server.engine_pid())) == 2
        assert _answer(server, 24) == expected
