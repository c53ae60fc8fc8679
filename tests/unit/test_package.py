from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

import minisgl
import requirements

PROJECT = tomllib.loads(requirements.PYPROJECT.read_text())["project"]


def test_version_is_the_same_everywhere() -> None:
    assert minisgl.__version__ == PROJECT["version"]
    changelog = requirements.PYPROJECT.with_name("CHANGELOG.md").read_text()
    assert f"## [{PROJECT['version']}]" in changelog or "## [Unreleased]" in changelog


def test_requirements_prints_the_groups_asked_for() -> None:
    command = [sys.executable, requirements.__file__, "base", "cuda"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert lines == PROJECT["dependencies"] + PROJECT["optional-dependencies"]["cuda"]


def test_requirements_refuses_an_unknown_group() -> None:
    with pytest.raises(SystemExit, match="no group 'gpu'; there are: build, base, .*, profile, dev"):
        requirements.requirements("gpu")
