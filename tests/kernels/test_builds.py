"""Every CUDA source compiles for every architecture, on a machine without a GPU."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("cuda.core", reason="the GPU extra isn't installed")

from minisgl.kernels import nvrtc
from minisgl.kernels.nvrtc import Build
from minisgl.kernels.spec import registry
from minisgl.types import KernelError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SPECS = registry().values()
BUILDS = [b for spec in SPECS for builds in (spec.builds, *(v.builds for v in spec.versions)) for b in builds]


def _name(build: Build) -> str:
    return f"{build.function}-{'-'.join(str(v) for _, v in build.defines)}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("build", BUILDS, ids=_name)
def test_build_compiles_without_spills(build: Build, arch: str) -> None:
    log = io.StringIO()
    code = nvrtc.compile_cubin(build, arch, log)
    assert code.startswith(b"\x7fELF") and build.function.encode() in code
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log.getvalue())
    assert spills == [("0", "0")], log.getvalue()
    assert "warning" not in log.getvalue()


def test_every_source_is_built() -> None:
    sources = {str(p.relative_to(nvrtc.FOLDER)) for p in nvrtc.FOLDER.rglob("*.cu")}
    assert sources == {build.source for build in BUILDS}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources of our own, and an empty cache."""
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path)
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))
    nvrtc._headers_digest.cache_clear()
    (tmp_path / "good.cu").write_text('extern "C" __global__ void good(float* x) { *x = VALUE; }\n')
    (tmp_path / "bad.cu").write_text('extern "C" __global__ void bad() { int a = nowhere; }\n')
    return tmp_path


def test_compile_error_shows_the_compilers_log(folder: Path) -> None:
    with pytest.raises(
        KernelError, match=r'bad\.cu doesn\'t compile for sm_90(?s:.*)identifier "nowhere" is undefined'
    ):
        nvrtc.compile_cubin(Build.of("bad.cu", "bad"), "sm_90")


def test_cache_keeps_and_returns_the_cubin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build.of("good.cu", "good", VALUE=1)
    code = nvrtc.cubin(build, "sm_90")
    assert nvrtc.cache_path(build, "sm_90").read_bytes() == code
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin(build, "sm_90") == code


def test_cache_key_covers_all_that_matters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [nvrtc.cache_path(Build.of("good.cu", "good", VALUE=1), "sm_90")]
    paths.append(nvrtc.cache_path(Build.of("good.cu", "good", VALUE=2), "sm_90"))
    paths.append(nvrtc.cache_path(Build.of("good.cu", "good", VALUE=1), "sm_80"))
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (99, 0))
    monkeypatch.setattr(nvrtc, "include_dir", lambda: folder)
    nvrtc._headers_digest.cache_clear()
    paths.append(nvrtc.cache_path(Build.of("good.cu", "good", VALUE=1), "sm_90"))
    (folder / "shared.cuh").write_text("// a header\n")
    nvrtc._headers_digest.cache_clear()
    paths.append(nvrtc.cache_path(Build.of("good.cu", "good", VALUE=1), "sm_90"))
    (folder / "good.cu").write_text("// changed\n")
    paths.append(nvrtc.cache_path(Build.of("good.cu", "good", VALUE=1), "sm_90"))
    assert len(set(paths)) == len(paths)


def test_cache_folder_that_cannot_be_written_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("MINISGL_CACHE", str(folder / "file"))
    assert nvrtc.cubin(Build.of("good.cu", "good", VALUE=1), "sm_90").startswith(b"\x7fELF")


@pytest.mark.parametrize("layout", ["cu13/include", "cuda_runtime/include"])
def test_include_dir_finds_either_layout(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / layout).mkdir(parents=True)
    (tmp_path / layout / "cuda_bf16.h").write_text("")
    monkeypatch.setattr(nvrtc, "_include_candidates", lambda major: [tmp_path / "cu13/include", tmp_path / layout])
    nvrtc.include_dir.cache_clear()
    assert nvrtc.include_dir() == tmp_path / layout
    nvrtc.include_dir.cache_clear()


def test_include_dir_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_include_candidates", lambda major: [tmp_path / "nowhere"])
    nvrtc.include_dir.cache_clear()
    with pytest.raises(KernelError, match=r"looked in .*nowhere.*minisgl\[cuda\]"):
        nvrtc.include_dir()
    nvrtc.include_dir.cache_clear()


def test_include_candidates_cover_cuda_12_and_13(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CUDA_HOME", "/somewhere")
    found = [str(p) for p in nvrtc._include_candidates(13)]
    assert any(p.endswith("nvidia/cu13/include") for p in found)
    assert any(p.endswith("nvidia/cuda_runtime/include") for p in found)
    assert "/somewhere/include" in found
