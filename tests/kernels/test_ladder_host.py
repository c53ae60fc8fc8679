"""The CUDA sources of index, store and their ladders run on the host, thread by thread, through the registry.

A host compiler takes the place of NVRTC, and threads that of a GPU's; what is assembly is written out in C++ here. So
addresses, bounds and the order of barriers are proved where there is no GPU; what remains is the hardware's part. This
file is also the program that runs them, in a process of its own: it replaces what launches.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import minisgl

HOST = Path(__file__).with_name("host")
COMPILER = shutil.which("g++")
CASES = {  # rows of an odd number of vectors, ids and slots that are out of range
    "index": {"tokens": 5, "width": 580, "vocab": 40, "start": 7, "length": 20, "id_bytes": 8},
    "store": {"tokens": 9, "heads": 3, "head_dim": 60, "slots": 40, "skip": 4, "pad": 8},
    "store_norm": {"tokens": 5, "heads": 3, "head_dim": 60, "width": 580, "slots": 40, "skip": 2, "pad": 4},
}
HEADERS = ("common.cuh", "head.cuh", "store/ladder/staging.cuh")
ASSEMBLY = {  # function → its body in C++
    "copy_async": "*shared = *global;",
    "load_hinted": "return *p;",
    "store_hinted": "*p = v;",
    "policy_first": "return 0;",
    "policy_last": "return 0;",
}


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize("kernel", CASES)
def test_every_version_is_right_on_the_host(kernel: str) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(minisgl.__file__).parent.parent)}
    done = subprocess.run([sys.executable, __file__, kernel], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 2, "no version ran"


def host_source(text: str) -> str:
    """A CUDA source without its assembly."""
    for name, body in ASSEMBLY.items():
        text = re.sub(rf"({name}\([^)]*\)) \{{.*?\n\}}", rf"\1 {{ {body} }}", text, flags=re.S)
    return re.sub(r"asm volatile\(.*?\);", "", text, flags=re.S)


def call_of(source: str, function: str) -> str:
    """The C++ call of `function` with the words a[0], a[1], … cast to its parameters' types."""
    found = re.search(rf"__global__ void {function}\((.*?)\)\s*\{{", source, re.S)
    assert found, f"{function} isn't in its source"
    words = []
    for i, parameter in enumerate(found[1].split(",")):
        kind = parameter.strip().rpartition(" ")[0] if "*" not in parameter else parameter.rpartition("*")[0] + "*"
        word = f"reinterpret_cast<const double&>(a[{i}])" if kind == "double" else f"({kind.strip()})a[{i}]"
        words.append(word)
    return f"{function}({', '.join(words)})"


@cache
def library(build: Any, folder: Path) -> Any:
    """`build` compiled for the host."""
    from minisgl.kernels import nvrtc

    place = folder / str(abs(hash(build)))
    for path in (*(nvrtc.FOLDER / header for header in HEADERS), nvrtc.FOLDER / build.source):
        copy = place / path.relative_to(nvrtc.FOLDER)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(host_source(path.read_text()))
    source = place / build.source
    macros = [f"-D{name}={value}" for name, value in build.defines]
    macros += [f'-DKERNEL="{source}"', f"-DCALL={call_of(source.read_text(), build.function)}"]
    flags = ["-std=c++20", "-O1", "-pthread", "-w", "-fpermissive", "-shared", "-fPIC", f"-I{HOST}", f"-I{place}"]
    target = place / "kernel.so"
    subprocess.run([str(COMPILER), *flags, *macros, str(HOST / "entry.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target)).run_grid


def on_host(folder: Path) -> Callable[..., Any]:
    """Stands in for `nvrtc.prepare`."""

    def prepare(build: Any, device: int, blocks: int, threads: int, pdl: bool) -> Callable[..., None]:
        run_grid = library(build, folder)

        def run(*args: int | float) -> None:
            words = [struct.unpack("q", struct.pack("d", x))[0] if isinstance(x, float) else int(x) for x in args]
            run_grid(ctypes.c_uint(blocks), ctypes.c_uint(threads), (ctypes.c_longlong * len(words))(*words))

        return run

    return prepare


def use_host(folder: Path) -> None:
    """Makes every launch of the modules under test run on the host."""
    from minisgl.kernels import check, spec
    from minisgl.kernels.index import ladder as index_ladder
    from minisgl.kernels.index import op as index_op
    from minisgl.kernels.rmsnorm import op as norm_op
    from minisgl.kernels.store import ladder as store_ladder
    from minisgl.kernels.store import op as store_op
    from minisgl.kernels.store_norm import ladder as store_norm_ladder
    from minisgl.kernels.tuning import Config

    prepare = on_host(folder)
    replaced: list[Any] = [index_op, index_ladder, norm_op, store_op, store_ladder, store_norm_ladder]
    for module in replaced:
        module.prepare = prepare
    check.cuda = lambda **_: 0  # type: ignore[assignment]
    spec.capability = lambda _: (9, 0)  # type: ignore[assignment]
    spec.choose = store_ladder.choose = lambda *_: Config(64, 2)


def run_all(kernel: str) -> None:
    """Checks every version of `kernel`; prints a line each."""
    import torch

    from minisgl.kernels.spec import registry
    from minisgl.profiling.correctness import verify

    with tempfile.TemporaryDirectory() as folder:
        use_host(Path(folder))
        spec = registry()[kernel]
        for version in spec.versions:

            def call(*args: Any, name: str = version.name) -> None:
                spec.run(*args, version=name)

            outcome = verify(spec, call, CASES[kernel], torch.float32, torch.device("cpu"), seed=1)
            print(kernel, version.name, outcome)
            if not outcome.ok:
                sys.exit(1)


if __name__ == "__main__":
    run_all(sys.argv[1])
