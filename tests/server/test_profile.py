"""/profile/start and /profile/stop, and the trace that comes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import KEY, Server, running, tiny_options

ANSWER = {"model": "tiny", "prompt": "ABCDEFGH" * 5, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def post(server: Server, path: str, body: Any = None, key: str | None = None) -> tuple[int, dict[str, Any]]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    response = httpx.post(server.url + path, json=body or {}, headers=headers, timeout=60)
    return response.status_code, response.json()


def code(answer: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


@pytest.fixture(scope="module")
def profiled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("traces")
    with running(*tiny_options(tiny_model), "--profile", str(folder)) as server:
        yield server.wait_ready()


@pytest.mark.parametrize("path", ["/profile/start", "/profile/stop"])
def test_profile_is_off_unless_the_server_allows_it(server: Server, path: str) -> None:
    status, body = post(server, path)
    assert code((status, body)) == (403, "profile_off")
    assert "--profile FOLDER" in body["error"]["message"]


@pytest.mark.parametrize("path", ["/profile/start", "/profile/stop"])
def test_profile_asks_for_the_key(fake: Server, path: str) -> None:
    assert code(post(fake, path)) == (401, "invalid_api_key")
    assert code(post(fake, path, key=KEY)) == (403, "profile_off")


def test_profile_starts_once_and_stops_once(profiled: Server) -> None:
    assert code(post(profiled, "/profile/stop")) == (409, "profile_not_running")
    assert post(profiled, "/profile/start") == (200, {"capturing": True})
    assert code(post(profiled, "/profile/start")) == (409, "profile_running")
    status, body = post(profiled, "/profile/stop")
    assert (status, body["capturing"]) == (200, False) and Path(body["path"]).is_file()
    assert code(post(profiled, "/profile/stop")) == (409, "profile_not_running")


def test_profile_traces_a_request_across_processes(profiled: Server) -> None:
    plain = post(profiled, "/v1/completions", ANSWER)[1]["choices"]
    post(profiled, "/profile/start")
    assert post(profiled, "/v1/completions", ANSWER)[1]["choices"] == plain
    path = post(profiled, "/profile/stop")[1]["path"]
    trace = json.loads(Path(path).read_text())

    names = {(e["name"], e["pid"]): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    seen = {(names["process_name", e["pid"]], e["name"]) for e in events}
    assert {("server", n) for n in ("tokenize", "send to engine", "detokenize")} <= seen
    assert {("engine", n) for n in ("apply", "schedule", "radix match", "sample", "send", "layer 0", "qkv")} <= seen
    assert trace["otherData"]["route"] and trace["otherData"]["dropped"] == 0
    assert not list(Path(path).parent.glob("engine-*")), "the engine's part is merged, and removed"
    check_nested(events)


def check_nested(events: list[dict[str, Any]]) -> None:
    """On a thread, a span begins and ends within the one around it, or apart from it."""
    slack = 0.002  # µs, of rounding
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in events:
        threads.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    assert len(threads) >= 2
    for spans in threads.values():
        around: list[float] = []
        for start, end in sorted(spans, key=lambda s: (s[0], -s[1])):
            while around and around[-1] <= start + slack:
                around.pop()
            assert not around or end <= around[-1] + slack
            around.append(end)


def test_profile_stops_costing_once_it_is_stopped(profiled: Server) -> None:
    post(profiled, "/profile/start")
    post(profiled, "/profile/stop")
    post(profiled, "/v1/completions", ANSWER)
    post(profiled, "/profile/start")
    trace = json.loads(Path(post(profiled, "/profile/stop")[1]["path"]).read_text())
    assert not [e for e in trace["traceEvents"] if e["name"] == "qkv"]


def test_profile_says_when_the_folder_cannot_be_written(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with running(*tiny_options(tiny_model), "--profile", str(tmp_path / "file" / "in it")) as server:
        server.wait_ready()
        assert post(server, "/profile/start")[0] == 200
        assert code(post(server, "/profile/stop")) == (409, "profile_failed")
        assert post(server, "/v1/completions", ANSWER)[0] == 200
