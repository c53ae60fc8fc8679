"""The command line: `minisgl COMMAND`, one module a command. Only what a command needs is imported."""

from __future__ import annotations

from minisgl.cli.main import main

__all__ = ["main"]
