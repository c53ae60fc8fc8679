"""The line of JSON that a benchmark leaves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import minisgl
from minisgl.types import MinisglError

_PACKAGES = ("torch", "triton", "numpy", "cuda-core")


def environment() -> dict[str, Any]:
    """When, with what and on which machine a figure was measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "minisgl": minisgl.__version__,
        "commit": os.environ.get("MINISGL_COMMIT") or _commit(),
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
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


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, '+' behind it if tracked files differ; else None."""
    package = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(package)]
    try:
        run = {"check": True, "capture_output": True, "text": True}
        found = subprocess.run([*git, "rev-parse", "--show-toplevel", "HEAD"], **run).stdout.split()  # type: ignore[call-overload]
        if len(found) != 2 or package.parents[1] != Path(found[0]):
            return None  # installed into some other repository
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return str(found[1][:12]) + "+" * (dirty != 0)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
