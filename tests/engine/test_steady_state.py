"""What a decode step asks of the CUDA runtime once everything runs: launches and copies counted by the profiler."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import GREEDY, Driver
from tiny import make_checkpoint

from minisgl.profiling.settled import only_decodes
from minisgl.types import SamplingParams

pytestmark = pytest.mark.cuda
STEPS, BATCH = 24, 6
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaStreamWaitEvent", "cudaMalloc")
PLAIN = replace(GREEDY, max_tokens=200)
FILTERED = replace(GREEDY, max_tokens=200, temperature=0.8, top_p=0.9, top_k=30, min_p=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint("qwen3", path)
    return path


def _count(driver: Driver, steps: int) -> Counter[str]:
    """Calls of the CUDA runtime and driver in `steps` steps."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            driver.step()
    names = (event.name for event in recorded.events() or ())
    return Counter(name for name in names if name.startswith(("cuda", "cu")) and not name.startswith("cublas"))


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["greedy", "filtered"])
@pytest.mark.parametrize("fused", ["on", "off"])
def test_decode_step_is_a_launch(folder: Path, params: SamplingParams, fused: str) -> None:
    driver = Driver(folder, device="cuda", dtype="bfloat16", fused_kernels=fused, attention="triton")
    for i in range(BATCH):
        driver.add([(7 * i + k) % 60 + 2 for k in range(20 + i)], params)
    for _ in range(8):
        driver.step()
    assert only_decodes(driver.engine.scheduler)
    calls = _count(driver, STEPS)
    assert {name for name in WAITS if calls[name] > STEPS // 8} == set(), calls  # the profiler has a few of its own
    assert calls["cudaGraphLaunch"] == (1 if params is PLAIN else 2) * STEPS, calls
    assert calls["cudaMemcpyAsync"] == 0, calls
    assert sum(n for name, n in calls.items() if "LaunchKernel" in name) == 0, calls
    assert calls["cudaEventSynchronize"] <= 2 * STEPS, calls  # the tokens, and a slot used eight steps ago


def test_decode_steps_synchronise_nothing_by_torchs_own_account(folder: Path) -> None:
    driver = Driver(folder, device="cuda", dtype="bfloat16", attention="triton")
    for i in range(BATCH):
        driver.add([(7 * i + k) % 60 + 2 for k in range(20 + i)], PLAIN if i % 2 else FILTERED)
    for _ in range(8):
        driver.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            driver.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
