"""The CPU kernels and their threads under sanitizers, as a program of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETS = {"avx512": "avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx2": "avx2 fma f16c", "portable": ""}


def _compiler(flags: list[str]) -> str:
    """A C++ compiler that can link a program with these sanitizers; skips the test where there is none."""
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    probe = [found, *flags, "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{found} can't build with {flags[-1]}")
    return found


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_cpu_kernels_are_clean_under_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    flags = ["-std=c++20", "-O1", "-g1", "-pthread", "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}"]
    compiler = _compiler(flags)
    sources = [ROOT / "tests/cpu/check_kernels.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]

    def build(source: Path) -> str:
        own = [f"-m{name}" for name in SETS.get(source.stem.removeprefix("kernels_"), "").split()]
        out = str(tmp_path / f"{source.stem}.o")
        command = [compiler, *flags, *own, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", out]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, (s for s in sources if s.name != "bindings.cpp")))
    program = tmp_path / "check"
    subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True)
    ran = subprocess.run([program, "0", "10"], capture_output=True, text=True, check=False, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
