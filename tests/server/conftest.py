"""Servers for the tests to talk to. `fake_engine` and `servers` are found beside this file, by child processes too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
