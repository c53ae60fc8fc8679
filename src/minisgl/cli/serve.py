"""`minisgl serve`: the engine process, and the HTTP server in front of it."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisgl import __version__
from minisgl.cli import options
from minisgl.config import EngineConfig

if TYPE_CHECKING:
    from minisgl.server.capture import Recorder
    from minisgl.server.service import Service

HELP = "Serve a model over HTTP, with the OpenAI API."
BATCHED_TOKENS = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_engine_options(parser)
    options.add_server_options(parser)


def run(args: argparse.Namespace) -> None:
    """Serves until a signal comes or the engine dies.

    Raises:
        MinisglError: wrong options, no such model, the port is taken, or the engine died.
    """
    from minisgl.engine.process import EngineProcess
    from minisgl.models.hub import resolve_model
    from minisgl.server.serve import bind, serve
    from minisgl.text import load_text

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    engine, server = engine_config(args), options.server_config(args)
    with bind(server) as listener:
        path = resolve_model(engine.model)

        def on_ready(service: Service) -> None:
            host, port = listener.getsockname()[:2]
            print(_welcome(service, f"http://{f'[{host}]' if ':' in host else host}:{port}"), flush=True)

        maker, recorder = _profiled(server.profile)
        with EngineProcess(replace(engine, model=str(path)), **maker) as process:
            name = server.served_model_name or engine.model
            serve(process, lambda: load_text(path), server, name, listener, on_ready, recorder)


def _profiled(folder: str | None) -> tuple[dict[str, str], Recorder | None]:
    """What makes an engine that can be captured, and what captures the server; neither without a folder for traces."""
    if folder is None:
        return {}, None
    from minisgl.profiling.capture import ServerRecorder

    return {"engine": "minisgl.profiling.served:make_engine"}, ServerRecorder(Path(folder))


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """With smaller steps than offline, unless told otherwise: a step must not hold up the streams for long."""
    config = options.engine_config(args)
    if config.max_batched_tokens is not None:
        return config
    return replace(config, max_batched_tokens=max(BATCHED_TOKENS, config.max_running or 0))


def _welcome(service: Service, url: str) -> str:
    """Where the server is, and a command to try it with."""
    limits = service.backend().limits
    if service.backend().text.chat_template is None:
        path, body = "/v1/completions", {"prompt": "The capital of France is", "max_tokens": 16}
    else:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]}
    data = shlex.quote(json.dumps(body))
    return (
        f"minisgl {__version__} serves {service.model_name} at {url}\n"
        f"({limits.device}, {limits.dtype}, up to {limits.max_total_tokens} tokens a request). Try:\n"
        f"  curl {url}{path} -H 'Content-Type: application/json' -d {data}"
    )
