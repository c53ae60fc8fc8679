"""The radix tree under AddressSanitizer and UndefinedBehaviorSanitizer, as a program of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    """A C++ compiler that can link a sanitized program; skips the test where there is none."""
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    probe = [found, *SANITIZE, "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{found} can't build with sanitizers")
    return found


@pytest.fixture(scope="module")
def fuzz_radix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("fuzz") / "fuzz_radix"
    sources = [ROOT / "tests/cache/fuzz_radix.cpp", *sorted((ROOT / "csrc/radix").glob("*.cpp"))]
    sources += [ROOT / "csrc/debug/integrity.cpp"]
    flags = [*SANITIZE, f"-I{ROOT / 'csrc'}"]
    command = [compiler(), *flags, "-DRADIX_HASH_MASK=63", *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize("seed", range(4))
def test_radix_random_operations_are_clean_under_sanitizers(fuzz_radix: Path, seed: int) -> None:
    ran = subprocess.run([fuzz_radix, str(seed), "20000"], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
