"""What every benchmark shares: the machine's description, statistics, and the results file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minisgl.hardware import detect
from minisgl.profiling.ceilings import memory_bandwidth
from minisgl.profiling.clock import spread, time_call
from minisgl.profiling.record import commit_id, installed_versions

__all__ = ["append_line", "environment", "memory_bandwidth", "spread", "time_call"]
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
