"""A real server for measurements: `minisgl serve` in a process of its own, and one streamed request to it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minisgl.cli.lab.tool import child_environment
from minisgl.cli.options import ENGINE_OPTIONS
from minisgl.config import EngineConfig
from minisgl.profiling.spans import Recorder
from minisgl.profiling.timeline import Answered
from minisgl.types import MinisglError

STOP_S = 30.0
TIMEOUT_S = 600.0  # for an answer
_SHOWN = 2000  # characters of a failed server's last words


def engine_arguments(config: EngineConfig) -> list[str]:
    """The command line that makes this configuration."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), ENGINE_OPTIONS[field.name]
        if option.switch:
            words += [option.flag] * (value is option.switched)
        elif value != field.default:
            words += [option.flag, str(value)]
    return words


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A server that answers at `port` of this machine."""

    port: int
    pid: int

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to `body`, decoded.

        Raises:
            MinisglError: it is an error, or none comes.
        """
        with self._connect() as connection:
            return json.loads(_send(connection, path, body or {}).read())

    def stream(self, prompt: str | list[int], max_tokens: int, recorder: Recorder) -> Answered:
        """Has `prompt` continued greedily by exactly `max_tokens`; the client's own work goes to `recorder`.

        Raises:
            MinisglError: the answer is an error, breaks off, or has no text.
        """
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        text = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
        arrived: list[int] = []
        usage: dict[str, int] = {}
        sent = time.perf_counter_ns()
        with self._connect() as connection:
            with recorder.span("connect"):
                connection.connect()
            with recorder.span("send request"):
                connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
            for event in _events(_checked(connection.getresponse())):
                if any(choice["text"] for choice in event["choices"]):
                    arrived.append(time.perf_counter_ns())
                usage = event.get("usage") or usage
        if not arrived or not usage:
            raise MinisglError("the answer has no text; choose another model or prompt")
        return Answered(sent, arrived[0], arrived[-1], usage["prompt_tokens"], usage["completion_tokens"])

    @contextmanager
    def _connect(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            try:
                yield connection
            except (OSError, http.client.HTTPException) as error:
                raise MinisglError(f"the server didn't answer: {error or type(error).__name__}") from None


def _send(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return _checked(connection.getresponse())


def _checked(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status != http.client.OK:
        raise MinisglError(f"the server answered {response.status}: {response.read(_SHOWN).decode(errors='replace')}")
    return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream as they arrive, up to its end mark."""
    while line := response.readline():
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                raise MinisglError(f"the server broke off: {event['error']['message']}")
            yield event
    raise MinisglError("the stream broke off before its end")


@contextmanager
def serving(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`minisgl serve` with `arguments`, at a free port, until the context is left.

    Raises:
        MinisglError: it doesn't start; with what it said.
    """
    command = [sys.executable, "-m", "minisgl", "serve", "--port", "0", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        environment = child_environment(env)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            yield Server(_port(process, log), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _port(process: subprocess.Popen[str], log: Any) -> int:
    """Waits for the server to say where it is."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r" at http://127\.0\.0\.1:(\d+)$", line.rstrip()):
            return int(found[1])
    process.wait()
    log.seek(0)
    raise MinisglError(f"the server ended before it served: {log.read()[-_SHOWN:].strip()}")
