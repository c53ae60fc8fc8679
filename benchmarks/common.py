"""What every benchmark shares: the machine's description, statistics, and the results file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisgl.hardware import detect
from minisgl.profiling.record import commit_id, installed_versions

HERE = Path(__file__).resolve().parent


def environment(device: str) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    hardware = detect()
    place = hardware.cuda.name if device == "cuda" and hardware.cuda else f"{hardware.cpu}, {hardware.num_cores} cores"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_id(but="benchmarks/results") or "unknown",
        "hardware": place,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "versions": installed_versions(),
    }


def append_line(file: str, record: dict[str, Any]) -> None:
    """Adds one JSON line to results/`file`."""
    path = HERE / "results" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    """Median, p10 and p90."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def time_call(call: Callable[[], object], device: str, repeat: int) -> list[float]:
    """Seconds of each of `repeat` calls, after two to warm up."""
    times = []
    for _ in range(repeat + 2):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return times[2:]


def memory_bandwidth(device: str) -> float:
    """Bytes per second that this device reads (CPU: a sum) or reads and writes (GPU: a copy); the best of several."""
    if device == "cuda":
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / min(time_call(lambda: target.copy_(source), device, 10))
    source = torch.ones(1 << 27)  # 512 MiB
    return source.numel() * 4 / min(time_call(source.sum, device, 5))
