"""What `resolve` makes of a configuration on machines that this one isn't."""

from __future__ import annotations

import logging

import pytest

from minisgl import config
from minisgl.config import EngineConfig, resolve
from minisgl.hardware import CudaDevice, Hardware
from minisgl.types import ConfigError


def _gpu(capability: tuple[int, int]) -> Hardware:
    return Hardware("", 2, 1, CudaDevice("GPU", capability, 132, 1, 1))


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that count as installed."""
    found = {"cuda", "cuda.core", "triton"}
    monkeypatch.setattr(config, "_installed", lambda *names: found.issuperset(names))
    return found


def test_steps_overlap_on_a_gpu_unless_told(packages: set[str]) -> None:
    assert resolve(EngineConfig(), _gpu((9, 0))).overlap is True
    assert resolve(EngineConfig(overlap=False), _gpu((9, 0))).overlap is False
    assert resolve(EngineConfig(device="cpu"), _gpu((9, 0))).overlap is False
    assert resolve(EngineConfig(device="cpu", overlap=True), _gpu((9, 0))).overlap is True


def test_fused_kernels_are_on_where_they_run(packages: set[str], caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(EngineConfig(), _gpu((9, 0))).fused_kernels == "on"
    assert resolve(EngineConfig(fused_kernels="off"), _gpu((9, 0))).fused_kernels == "off"
    assert resolve(EngineConfig(device="cpu"), _gpu((9, 0))).fused_kernels == "off"
    assert not caplog.records


def test_fused_kernels_say_what_is_missing(packages: set[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert resolve(EngineConfig(), _gpu((7, 5))).fused_kernels == "off"
    packages.remove("cuda.core")
    assert resolve(EngineConfig(), _gpu((9, 0))).fused_kernels == "off"
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2 and "8.0" in told[0] and "cuda-core" in told[1]


@pytest.mark.parametrize(
    ("hardware", "reason"), [(Hardware("", 2, 1, None, "none"), "GPU"), (_gpu((7, 5)), "capability")]
)
def test_fused_kernels_asked_for_in_vain(packages: set[str], hardware: Hardware, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(EngineConfig(fused_kernels="on"), hardware)
    with pytest.raises(ConfigError, match="auto, on or off"):
        EngineConfig(fused_kernels="yes")
