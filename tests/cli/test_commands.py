"""What holds for every command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minisgl.cli.main import COMMANDS

SLOW = "torch numpy msgspec fastapi pydantic zmq rich prompt_toolkit huggingface_hub asyncio".split()
EACH = [[], *([name] for name in COMMANDS), ["bench", "offline"], ["bench", "serve"]]


@pytest.mark.parametrize("args", EACH, ids=" ".join)
def test_help_is_instant(args: list[str], child_env: dict[str, str]) -> None:
    script = (
        f"import sys; from minisgl.cli import main\n"
        f"try: main({[*args, '--help']})\n"
        f"except SystemExit: print(*(name for name in {SLOW} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=child_env, capture_output=True, text=True, check=True)
    assert "usage: minisgl" in done.stdout
    assert done.stdout.splitlines()[-1] == "", "loaded what takes long to load"
