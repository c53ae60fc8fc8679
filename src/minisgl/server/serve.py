"""The life of the server process: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn

from minisgl.config import ServerConfig
from minisgl.server.app import create_app
from minisgl.server.capture import Capture, Recorder
from minisgl.server.client import AsyncEngineClient, EngineHandle
from minisgl.server.gate import Connection
from minisgl.server.service import Backend, Service
from minisgl.text import OutputProcessor, Text
from minisgl.types import ConfigError, EngineDeadError

KEEP_ALIVE_S = 65  # longer than the clients' and proxies' own limits, so that they close idle connections
DEAD_S = 1.0  # how long /health tells that the engine died before the process ends


def bind(config: ServerConfig) -> socket.socket:
    """A socket at the address of `config`, not yet listening; port 0 lets the system choose.

    Raises:
        ConfigError: the address can't be had.
    """
    with _address_errors(config):
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener


@contextmanager
def _address_errors(config: ServerConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(
            f"can't listen on {config.host} port {config.port}: {reason}; choose another with --host or --port"
        ) from None


def serve(
    engine: EngineHandle, load_text: Callable[[], Text], config: ServerConfig, model_name: str,
    listener: socket.socket, on_ready: Callable[[Service], None], recorder: Recorder | None = None,
) -> None:  # fmt: skip
    """Serves until SIGTERM or SIGINT; the first one lets answers under way end, a second one ends at once.

    Args:
        engine: a process just started; told to shut down on the way out.
        load_text: reads the text side of the model; runs in a thread while the engine loads its own.
        on_ready: called once, when requests are served.
        recorder: for `/profile/start` and `/profile/stop`, which without one are refused.

    Raises:
        MinisglError: the model can't be loaded, or the engine died.
    """
    with _address_errors(config):
        listener.listen()
    with suppress(ValueError, OSError):  # every client takes a file descriptor; the usual 1,024 are soon gone
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    service = Service(config, model_name, capture=Capture(recorder) if recorder is not None else None)
    asyncio.run(_Life(engine, load_text, service, on_ready).run(listener))


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process with the signal's exit code."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class _Life:
    _engine: EngineHandle
    _load_text: Callable[[], Text]
    _service: Service
    _on_ready: Callable[[Service], None]
    _client: AsyncEngineClient | None = None
    _death: BaseException | None = None

    def __post_init__(self) -> None:
        config = self._service.config
        protocol: Any = partial(Connection, timeout=config.client_timeout)
        server = uvicorn.Config(
            create_app(self._service), http=protocol, ws="none", lifespan="off", log_config=None, log_level="warning",
            access_log=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(config.drain_timeout) + 2,
        )  # fmt: skip
        self._http = _HttpServer(server)

    async def run(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        http = asyncio.create_task(self._http.serve(sockets=[listener]))
        backend = asyncio.create_task(self._run_backend())
        try:
            await asyncio.wait({http, backend}, return_when=asyncio.FIRST_COMPLETED)
            if backend.done() and self._service.status != "stopping":
                await self._report_death(backend.exception())
            await http
        finally:
            backend.cancel()
            await asyncio.gather(backend, return_exceptions=True)
            if self._client is not None:
                self._client.close()
        if self._death is not None:
            raise self._death

    async def _run_backend(self) -> None:
        """Loads, then delivers outputs for as long as the engine lives.

        Raises:
            MinisglError: the model can't be loaded, or the engine ended.
        """
        text = await asyncio.to_thread(self._load_text)
        client = AsyncEngineClient(self._engine, OutputProcessor(text.tokenizer), self._service.config.max_queue)
        self._client = client
        client.ready.add_done_callback(lambda ready: self._begin(Backend(text, client, ready.result())))
        await client.run()

    def _begin(self, backend: Backend) -> None:
        if self._service.status == "starting":
            self._service.start(backend)
            gc.collect()
            gc.freeze()
            self._on_ready(self._service)

    async def _report_death(self, error: BaseException | None) -> None:
        """Keeps answering with 503 for a moment, so that whoever watches learns why."""
        served = self._service.status == "ok"
        self._service.status, self._service.error = "failed", str(error)
        self._death = error
        if served:
            await asyncio.sleep(DEAD_S)
        self._http.should_exit = True

    def _stop(self) -> None:
        """On the first signal stops accepting and lets answers end for a while; on a second one ends them."""
        again, self._http.should_exit = self._http.should_exit, True
        if self._death is None:
            self._service.status = "stopping"
        if again:
            self._http.force_exit = True
            self._end_streams()
        else:
            asyncio.get_running_loop().call_later(self._service.config.drain_timeout, self._end_streams)

    def _end_streams(self) -> None:
        if self._client is not None:
            self._client.fail(EngineDeadError("the server is shutting down"))
