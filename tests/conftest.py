"""What all tests share. One thread each: the tests are many and small, and a CI machine has few cores."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

import pytest

import minisgl

TREE = Path(__file__).resolve().parent.parent / "src" / "minisgl"
MARKERS = {
    "slow": "takes minutes; -m slow runs it",
    "cuda": "needs an NVIDIA GPU; make test-gpu runs it",
}


def pytest_configure() -> None:
    installed = Path(minisgl.__file__).parent
    if installed == TREE:
        return
    for path in sorted(TREE.rglob("*")):
        copy = installed / path.relative_to(TREE)
        if path.is_dir() or path.suffix in (".pyc", ".so"):
            continue
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            raise pytest.UsageError(f"{installed} isn't what the tree holds ({path} differs); use make test")


def pytest_report_header() -> str:
    from minisgl.cache.prefix import make_prefix_cache

    return f"minisgl: {Path(minisgl.__file__).parent}, prefix cache: {type(make_prefix_cache(1)).__module__}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what was not asked for by `-m`, where deselecting would hide it, and GPU tests where there is no GPU."""
    asked = config.option.markexpr
    for item in items:
        for marker, reason in MARKERS.items():
            if marker in item.keywords and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=reason))
        if "cuda" in item.keywords and "cuda" in asked and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="torch sees no NVIDIA GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's file, fetched if it isn't in the cache yet."""
    from minisgl.models.hub import resolve_model

    return resolve_model("smollm2", progress=False)
