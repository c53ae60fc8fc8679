from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import check_imports


def _check(root: Path, files: dict[str, str]) -> list[str]:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return [message.removeprefix(f"{root}/") for message in check_imports.check(root)]


@pytest.mark.parametrize(
    ("file", "source", "says"),
    [
        ("cache/pool.py", "from minisgl.engine.runner import Runner", "cache must not import minisgl.engine.runner"),
        ("cache/pool.py", "import minisgl.models", "cache must not import minisgl.models"),
        ("cache/pool.py", "from minisgl import models", "cache must not import minisgl.models"),
        ("cache/pool.py", "from ..models import load", "cache must not import minisgl.models.load"),
        ("cache/pool.py", "from .. import models", "cache must not import minisgl.models"),
        ("cache/__init__.py", "from ..kernels import x", "cache must not import minisgl.kernels.x"),
        ("server/app.py", "def f():\n    from minisgl.engine import engine", "server must not import minisgl.engine"),
        ("server/app.py", "if TYPE_CHECKING:\n    import minisgl.llm", "server must not import minisgl.llm"),
        ("server/app.py", "importlib.import_module('minisgl.models')", "server must not import minisgl.models"),
        ("server/app.py", "from minisgl import __version__", "server must not import minisgl.__version__"),
        ("engine/scheduler.py", "import torch.nn", "engine.scheduler must not import torch"),
        ("text/output.py", "from torch import Tensor", "text must not import torch"),
        ("types.py", "import numpy", "types must not import numpy; it may import: the standard library"),
        ("types.py", "import minisgl.config", "it may import: nothing of this package"),
        ("models/llama.py", "import transformers", "nothing here may import transformers"),
        ("extra/a.py", "x = 1", "minisgl.extra.a belongs to no unit"),
        ("extra.py", "x = 1", "minisgl.extra belongs to no unit"),
    ],
)
def test_check_reports_what_points_the_wrong_way(tmp_path: Path, file: str, source: str, says: str) -> None:
    (message,) = _check(tmp_path, {file: source})
    line = source.count("\n") + 1
    assert message.startswith(f"{file}:{line}: ")
    assert says in message


def test_check_allows_what_points_the_right_way(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from minisgl.types import A\nfrom minisgl.llm import LLM",
        "types.py": "import math, enum",
        "cache/pool.py": "import torch\nfrom minisgl.cache.base import X\nfrom . import base\nfrom ..types import A",
        "engine/runner.py": "import torch\nfrom minisgl.messages import X\nfrom minisgl.attention import Y",
        "engine/scheduler.py": "from minisgl.cache import prefix",
        "server/app.py": "import fastapi\nfrom minisgl.text import Text",
        "cli/main.py": "from minisgl import __version__\nfrom minisgl.server import app",
    }
    assert _check(tmp_path, files) == []


def test_rules_leave_no_way_round() -> None:
    """Units in the order that each follows all it may import; fails if there is a cycle or an unknown name."""
    left = {unit: set(allowed) - {unit} for unit, allowed in check_imports.MAY_IMPORT.items()}
    while left:
        free = {unit for unit, allowed in left.items() if not allowed}
        assert free, f"cycle among {sorted(left)}"
        left = {unit: allowed - free for unit, allowed in left.items() if unit not in free}


@pytest.mark.parametrize("module", ["types", "messages", "text", "engine.scheduler", "engine.process", "server.app"])
def test_module_loads_without_torch(module: str) -> None:
    """Nor may it load torch by way of another module, which the source check doesn't see."""
    code = f"import sys, minisgl.{module}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert loaded.stdout.split() == []
