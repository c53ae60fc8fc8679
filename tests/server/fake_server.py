"""`minisgl` with `FakeEngine` for an engine: it starts in a second, and its answers are known."""

from __future__ import annotations

import functools
import sys

from fake_engine import NAME

from minisgl.cli import main
from minisgl.engine import process

if __name__ == "__main__":
    process.EngineProcess = functools.partial(process.EngineProcess, engine=NAME)  # type: ignore[misc,assignment]
    sys.exit(main())
