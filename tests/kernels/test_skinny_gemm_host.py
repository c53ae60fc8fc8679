"""skinny_gemm's CUDA source run on the host, thread by thread, its matrix instruction by the manual's layout."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from minisgl.kernels import nvrtc
from minisgl.kernels.nvrtc import Build
from minisgl.kernels.skinny_gemm.ladder import build_v2, tiling_v2
from minisgl.kernels.skinny_gemm.op import build_for, tiling
from minisgl.kernels.spec import Shape
from minisgl.kernels.tuning import Config

HOST = Path(__file__).with_name("host")
COMPILER = shutil.which("g++")
CASES: list[tuple[torch.dtype, int, tuple[int, int, int, int, int], Config]] = [  # dtype, add, shape, configuration
    (torch.bfloat16, 0, (1, 64, 96, 1, 0), Config(128, 1)),  # more warps than steps
    (torch.bfloat16, 0, (11, 64, 352, 1, 1), Config(64, 2)),  # a last round that isn't full
    (torch.float16, 1, (24, 128, 128, 0, 0), Config(64, 4)),
    (torch.float16, 0, (3, 128, 288, 0, 1), Config(32, 4)),
]


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize(("dtype", "add", "sizes", "config"), CASES)
def test_skinny_gemm_v2_is_right_on_the_host(
    dtype: torch.dtype, add: int, sizes: tuple[int, int, int, int, int], config: Config, tmp_path: Path
) -> None:
    shape: Shape = dict(zip(("tokens", "n", "k", "norm", "gated"), sizes, strict=True)) | {"add": add}
    tiles = tiling_v2(shape, config)
    _check(dtype, shape, build_v2(dtype, shape, *tiles), shape["n"] // 16 // tiles[1], tmp_path)


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize(("apart", "blocks"), [(0, 2), (1, 1), (0, 100)])
@pytest.mark.parametrize(
    ("dtype", "add", "sizes", "config"), [*CASES, (torch.bfloat16, 1, (2, 40, 320, 0, 0), Config(64, 1))]
)
def test_skinny_gemm_source_is_right_on_the_host(
    dtype: torch.dtype,
    add: int,
    sizes: tuple[int, int, int, int, int],
    config: Config,
    apart: int,
    blocks: int,
    tmp_path: Path,
) -> None:
    """With blocks that have several pieces of the matrix to do, and with one each."""
    shape: Shape = dict(zip(("tokens", "n", "k", "norm", "gated"), sizes, strict=True)) | {"add": add}
    tiles = tiling(shape, config)
    blocks = min(blocks, shape["n"] // 8 // tiles[1])
    _check(dtype, shape, build_for(dtype, shape, *tiles, apart), blocks, tmp_path)


def _check(dtype: torch.dtype, shape: Shape, build: Build, blocks: int, tmp_path: Path) -> None:
    source = (nvrtc.FOLDER / build.source).read_text()
    source, found = re.subn(
        r"asm volatile\(\"mma.*?\)\);",
        "host_mma<T>(c, a, b0, b1, [](T v) { return to_float(v); });",
        source,
        flags=re.S,
    )
    assert found == 1
    (tmp_path / "kernel.cu").write_text(source)
    macros = [f"-D{name}={value}" for name, value in build.defines]
    macros += [f"-DROWS={shape['tokens']}", f"-DBLOCKS={blocks}"]
    command = [str(COMPILER), "-std=c++20", "-O1", "-pthread", "-w", *macros]
    command += [f'-DKERNEL="{tmp_path / "kernel.cu"}"', f"-I{HOST}", f"-I{nvrtc.FOLDER}"]
    program = tmp_path / "program"
    built = subprocess.run(
        [*command, str(HOST / "skinny_gemm.cpp"), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stdout
    assert float(ran.stdout) < (6e-3 if dtype == torch.bfloat16 else 8e-4)
