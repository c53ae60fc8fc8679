"""Running one of NVIDIA's profilers around a command."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minisgl.types import ConfigError, MinisglError

_PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/opt/nvidia/nsight-systems/*/bin")


def add_program(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The command to profile."""
    parser.add_argument(
        "program", nargs="*", metavar="-- COMMAND", default=list(default),
        help=f"what to run: arguments of minisgl, or another program (default: {' '.join(default)})",
    )  # fmt: skip


def find(name: str, install: str) -> str:
    """The path of a tool.

    Raises:
        MinisglError: it isn't installed; `install` says how to get it.
    """
    if path := shutil.which(name):
        return path
    for place in _PLACES:
        for folder in sorted(Path("/").glob(place.lstrip("/")), reverse=True):  # the newest version first
            if os.access(folder / name, os.X_OK):
                return str(folder / name)
    raise MinisglError(f"{name} is not installed; {install}")


def program(words: Sequence[str]) -> list[str]:
    """The command line for `words`: with this interpreter where they are a command of minisgl's.

    Raises:
        ConfigError: there is no such program.
    """
    from minisgl.cli.main import COMMANDS

    words = list(words[words[0] == "minisgl" and len(words) > 1 :])
    if words[0] in COMMANDS:
        return [sys.executable, "-m", "minisgl", *words]
    if shutil.which(words[0]) is None:
        raise ConfigError(f"{words[0]!r} is neither a program nor a command of minisgl ({', '.join(COMMANDS)})")
    return words


def run(command: Sequence[str], env: dict[str, str] | None = None) -> int:
    """The exit code of `command`, run to its end with our own output; Ctrl-C is left to it."""
    process = subprocess.Popen(command, env=child_environment(env))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def run_limited(command: Sequence[str], limit_s: float) -> int | None:
    """The exit code of `command`; None if it took longer than `limit_s`: it is killed then, with all that it began."""
    process = subprocess.Popen(command, env=child_environment(), start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def child_environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment, in which `python -m minisgl` runs the same sources as this process."""
    found = {**os.environ, **(more or {})}
    package = str(Path(__file__).resolve().parents[3])
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (package, found.get("PYTHONPATH"))))
    return found
