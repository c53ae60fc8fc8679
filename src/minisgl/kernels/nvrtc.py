"""CUDA C++ compiled at first use: NVRTC to a cubin for the exact GPU, a cache on disk, launches of a few microseconds.

No CUDA toolkit is needed. The compiler and its headers are the pip packages that torch itself depends on; `cuda.core`
(the extra `minisgl[cuda]`) drives them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minisgl.gguf_file import cache_dir, write_atomically
from minisgl.types import KernelError

if TYPE_CHECKING:
    from cuda.core import Kernel, LaunchConfig, Stream

FOLDER = Path(__file__).parent
Capability = tuple[int, int]
_CUDA_HEADERS = ("cuda_bf16.h", "cuda_bf16.hpp", "cuda_fp16.h", "cuda_fp16.hpp", "cuda_fp8.h", "cuda_fp8.hpp")
CTYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
ID_CTYPES = {4: "int", 8: "int64"}  # by bytes; common.cuh defines int64
_INSTALL = "install the GPU extra: pip install 'minisgl[cuda]'"


@dataclass(frozen=True, slots=True)
class Build:
    """One function of one source file under one set of macros: what the compiler turns into a cubin."""

    source: str  # path below minisgl/kernels
    function: str
    defines: tuple[tuple[str, str | int], ...] = ()

    @staticmethod
    def of(source: str, function: str, **defines: str | int) -> Build:
        return Build(source, function, tuple(sorted(defines.items())))


def arch_of(capability: Capability) -> str:
    return f"sm_{capability[0]}{capability[1]}"


@cache
def capability(device: int) -> Capability:
    """Compute capability of CUDA device number `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


@cache
def nvrtc_version() -> tuple[int, int]:
    try:
        from cuda.bindings import nvrtc

        error, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as e:  # RuntimeError: the shared library is missing
        raise KernelError(f"the CUDA compiler NVRTC can't be loaded ({e}); {_INSTALL}") from e
    if int(error):
        raise KernelError(f"NVRTC doesn't tell its version: {error}")
    return major, minor


def _include_candidates(major: int) -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(root) / f"cu{major}" / "include"  # CUDA 13: one folder for all
        yield Path(root) / "cuda_runtime" / "include"  # CUDA 12: a folder a package
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name]) / "include"


@cache
def include_dir() -> Path:
    """The folder that holds cuda_bf16.h and cuda_fp16.h, from the pip package of the CUDA runtime.

    Raises:
        KernelError: no candidate has them; the error lists the folders tried.
    """
    tried = list(_include_candidates(nvrtc_version()[0]))
    for folder in tried:
        if (folder / _CUDA_HEADERS[0]).is_file():
            return folder
    places = ", ".join(map(str, tried)) or "no folder (the package nvidia-cuda-runtime isn't installed)"
    raise KernelError(f"{_CUDA_HEADERS[0]} wasn't found; looked in {places}; {_INSTALL}")


@cache
def _headers_digest() -> bytes:
    ours = sorted(FOLDER.rglob("*.cuh"))
    theirs = [include_dir() / name for name in _CUDA_HEADERS]
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in (*ours, *theirs) if p.is_file())).digest()


def _flags(build: Build, arch: str) -> dict[str, Any]:
    macros = [f"{name}={value}" for name, value in build.defines]
    return {"std": "c++17", "arch": arch, "define_macro": macros or None, "name": build.source}


def cache_path(build: Build, arch: str) -> Path:
    """Where the cubin is kept: its name covers source, headers, flags, architecture and compiler version."""
    flags = repr((sorted(_flags(build, arch).items()), build.function, nvrtc_version()))
    digest = hashlib.sha256((FOLDER / build.source).read_bytes() + _headers_digest() + flags.encode())
    return cache_dir() / "kernels" / f"{build.function}-{arch}-{digest.hexdigest()[:32]}.cubin"


def compile_cubin(build: Build, arch: str, log: Any = None) -> bytes:
    """Compiles without looking at the cache; needs no GPU.

    Args:
        log: has `write`; given, it receives the assembler's report (registers, spills).

    Raises:
        KernelError: the source doesn't compile; the text is the compiler's log.
    """
    include_dir()  # the clearer error, if NVRTC or its headers are missing
    from cuda.core import Program, ProgramOptions

    report: Mapping[str, Any] = {} if log is None else {"ptxas_options": ["-v"]}
    options = ProgramOptions(**_flags(build, arch), include_path=[str(FOLDER), str(include_dir())], **report)
    try:
        code = Program((FOLDER / build.source).read_text(), "c++", options).compile("cubin", logs=log).code
    except Exception as e:
        raise KernelError(f"{build.source} doesn't compile for {arch} with {dict(build.defines)}:\n{e}") from e
    assert isinstance(code, bytes)
    return code


def cubin(build: Build, arch: str) -> bytes:
    """The compiled code, from the cache on disk or else compiled and put there."""
    path = cache_path(build, arch)
    try:
        return path.read_bytes()
    except OSError:
        code = compile_cubin(build, arch)
        write_atomically(path, code)
        return code


@cache
def load(build: Build, device: int) -> Kernel:
    """The kernel on device `device`. A cached cubin that the driver rejects is compiled afresh."""
    arch = arch_of(capability(device))
    code = cubin(build, arch)
    from cuda.core import Device, ObjectCode

    Device(device).set_current()
    try:
        return ObjectCode.from_cubin(code).get_kernel(build.function)
    except Exception:
        cache_path(build, arch).unlink(missing_ok=True)
        return ObjectCode.from_cubin(cubin(build, arch)).get_kernel(build.function)


@cache
def _stream(raw: int) -> Stream:
    """torch's stream with handle `raw`, wrapped once: wrapping costs more than a launch."""
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(raw) if raw else LEGACY_DEFAULT_STREAM


@lru_cache(maxsize=4096)
def _config(blocks: int, threads: int, pdl: bool) -> LaunchConfig:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=blocks, block=threads, programmatic_stream_serialization=pdl)


def prepare(build: Build, device: int, blocks: int, threads: int, pdl: bool) -> Callable[..., None]:
    """A launch with everything settled but the arguments.

    Args:
        pdl: programmatic dependent launch: the kernel may start while the one before it on the stream runs, and
            waits for it by itself (`pdl::wait` in common.cuh). Ignored before compute capability 9.0.

    Returns:
        A function of the kernel's arguments: int for pointers and 64-bit integers, float for doubles. It launches on
        torch's current stream, also while that is being captured into a graph.
    """
    from cuda.core import launch

    kernel = load(build, device)
    config = _config(blocks, threads, pdl and capability(device) >= (9, 0))
    current_stream = torch._C._cuda_getCurrentRawStream  # the public way costs a microsecond more

    def run(*args: int | float) -> None:
        launch(_stream(current_stream(device)), config, kernel, *args)

    return run
