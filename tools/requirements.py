"""Prints requirements from pyproject.toml, one a line, for `pip install -r`.

Arguments name groups: `build` (what builds the package), `base` (what it needs to run), `cmake` (CMake and a build
tool, if this machine lacks them; needs `build` installed), or one of the package's extras.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(group: str) -> list[str]:
    """
    Raises:
        SystemExit: there is no such group.
    """
    pyproject = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    if group == "build":
        found = pyproject["build-system"]["requires"]
    elif group == "base":
        found = pyproject["project"]["dependencies"]
    elif group == "cmake":
        from scikit_build_core.build import get_requires_for_build_wheel

        found = get_requires_for_build_wheel()
    elif group in extras:
        found = extras[group]
    else:
        raise SystemExit(f"no group {group!r}; there are: build, base, cmake, {', '.join(extras)}")
    return [str(requirement) for requirement in found]


if __name__ == "__main__":
    print("\n".join(line for group in sys.argv[1:] for line in requirements(group)))
