"""A small model with text that 1, 2, 4 or 8 ranks can share, and ranks that compare their state before every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_world import write_model


@pytest.fixture(scope="session")
def tp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tp"))


@pytest.fixture(autouse=True)
def check_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CHECK_RANKS", "1")
