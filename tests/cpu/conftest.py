"""The CPU kernels, once for each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from minisgl.kernels import cpu

collect_ignore_glob = [] if cpu.available() else ["test_*.py"]
CHOICE = cpu.native.cpu_available_kernels() if cpu.available() else []


@pytest.fixture(params=CHOICE)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.native.cpu_select_kernels(request.param)
    yield str(request.param)
    cpu.native.cpu_select_kernels(CHOICE[0])


@pytest.fixture
def threads() -> Iterator[None]:
    """Three threads, more than a small machine has cores, so that work is really shared."""
    before = cpu.native.cpu_threads()
    cpu.native.cpu_set_threads(3)
    yield
    cpu.native.cpu_set_threads(before)
