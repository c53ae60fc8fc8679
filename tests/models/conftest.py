"""Tiny checkpoints are written once a session; Triton's kernels are interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreter  # noqa: F401 (it sets the switch)
import pytest
from tiny import make_checkpoint

Checkpoint = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Family → (folder, the transformers model that wrote it)."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, make_checkpoint(family, folder)
        return made[family]

    return get
