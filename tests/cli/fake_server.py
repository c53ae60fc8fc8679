"""`python fake_server.py MODEL_FOLDER MOOD`: our HTTP server over an engine without a model, at a free port."""

from __future__ import annotations

import sys
from pathlib import Path

import fake_engine

from minisgl.config import EngineConfig, ServerConfig
from minisgl.engine.process import EngineProcess
from minisgl.server.serve import bind, serve
from minisgl.text import load_text


def main(folder: str, mood: str) -> None:
    config = ServerConfig(port=0)
    with bind(config) as listener, EngineProcess(EngineConfig(model=mood), fake_engine.NAME) as process:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serve(process, lambda: load_text(Path(folder)), config, "fake", listener, lambda _: print(url, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
