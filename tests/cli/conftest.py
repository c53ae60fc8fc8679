"""A one-layer model with random weights for what needs no sense, and the environment of child processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from batch_files import Files
from servers import make_model

from minisgl import LLM


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), device="cpu", dummy_weights=True, num_pages=400, max_running=8)


@pytest.fixture(scope="session")
def child_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def one_engine(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process share one engine."""
    monkeypatch.setattr("minisgl.llm.LLM", lambda **_: tiny_llm)


@pytest.fixture
def files(tmp_path: Path, one_engine: None) -> Files:
    return Files(tmp_path / "requests.jsonl", tmp_path / "answers.jsonl")
