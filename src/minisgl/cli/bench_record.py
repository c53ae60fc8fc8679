"""The line of JSON that a benchmark leaves."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import minisgl
from minisgl.profiling.record import commit_id, installed_versions
from minisgl.types import MinisglError


def environment() -> dict[str, Any]:
    """When, with what and on which machine a figure was measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "minisgl": minisgl.__version__,
        "commit": commit_id(),
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {name: found for name, found in installed_versions().items() if name != "minisgl"},
    }


def save(path: Path | None, record: dict[str, Any] | None = None) -> None:
    """Appends `record` to the file; without one, finds out whether that will work, before time goes into it.

    Raises:
        MinisglError: it can't be written.
    """
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("" if record is None else json.dumps(record) + "\n")
    except OSError as error:
        raise MinisglError(f"can't write {path}: {error.strerror}") from None
