"""One server for all tests that do no harm to it. Helper modules lie beside this file; child processes import some."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from servers import KEY, Server, make_model, running, tiny_options


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[Server]:
    with running(*tiny_options(tiny_model)) as server:
        yield server.wait_ready()


@pytest.fixture(scope="session")
def fake(tiny_model: Path) -> Iterator[Server]:
    """A server with a fake engine, a key, and little patience."""
    options = [*tiny_options(tiny_model), "--cors", "https://a.example, https://b.example", "--client-timeout", "1.5"]
    with running(*options, env={"MINISGL_API_KEY": KEY}, fake=True) as server:
        yield server.wait_ready()
