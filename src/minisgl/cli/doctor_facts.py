"""What `minisgl doctor` looks at. Nothing here may fail: what can't be found out is a finding too.

Only the standard library is imported at the top, so that the doctor can come to a machine that lacks everything else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minisgl.hardware import CudaDevice, available_memory, detect

# What minisgl needs: package → module, oldest version. pyproject.toml says the same.
PACKAGES = {
    "torch": ("torch", "2.9"),
    "numpy": ("numpy", "1.26"),
    "msgspec": ("msgspec", "0.19"),
    "pyzmq": ("zmq", "26"),
    "fastapi": ("fastapi", "0.115"),
    "uvicorn": ("uvicorn", "0.34"),
    "tokenizers": ("tokenizers", "0.21"),
    "jinja2": ("jinja2", "3.1"),
    "safetensors": ("safetensors", "0.5"),
    "gguf": ("gguf", "0.17"),
    "huggingface_hub": ("huggingface_hub", "0.28"),
    "rich": ("rich", "13"),
    "prompt_toolkit": ("prompt_toolkit", "3.0.40"),
    "prometheus-client": ("prometheus_client", "0.21"),
}
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")
PROBE = "rmsnorm"
PIP_TIMEOUT_S = 60
_NVIDIA = "0x10de"


@dataclass(frozen=True)
class Gpu:
    """The GPU that torch would use. `probe` is how the probe kernel went: milliseconds, or the error."""

    device: CudaDevice
    free_bytes: int
    oldest_supported: tuple[int, int]  # capability that the installed torch has code for
    probe: float | str = "not tried"


@dataclass(frozen=True)
class Store:
    """The cache folder, and the default model in it."""

    folder: Path
    folder_error: str | None  # why it can't be written
    free_bytes: int
    model: Path
    model_bytes: int
    model_present: bool
    fetch_error: str | None  # why the model can't be fetched, if it isn't here


@dataclass(frozen=True)
class CommTable:
    """How all-reduces go between GPUs that a table was measured on: (largest bytes, path), small ones first."""

    gpus: tuple[str, ...]  # a name for each rank
    ranges: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Facts:
    """A machine, as far as it concerns minisgl."""

    python: tuple[int, int] = (3, 11)
    system: str = "Linux"
    machine: str = "x86_64"
    cpu: str = ""
    cpu_features: tuple[str, ...] = ()
    num_cores: int = 1
    memory_bytes: int = 0
    available_bytes: int = 0  # 0: unknown
    packages: dict[str, str | None] = field(default_factory=dict)  # version; None: not installed
    torch_cuda: str | None = None  # version of CUDA that torch was built for
    torch_error: str | None = None  # why torch can't be imported
    nvidia_hardware: bool = False
    driver_cuda: tuple[int, int] | None = None  # newest CUDA that the driver runs; None: there is no driver
    gpu: Gpu | None = None
    gpu_error: str | None = None
    cuda_core: str | None = None
    c_compiler: str | None = None
    extension_error: str | None = None
    comm: tuple[CommTable, ...] = ()  # of every group of GPUs that has run here
    store: Store | None = None  # None: packages that are missing are needed to look


def look() -> Facts:
    """Examines this machine; takes seconds, and asks the package index if the default model isn't here."""
    packages = {name: _version(name, module) for name, (module, _) in PACKAGES.items()}
    torch_error = _import_error("torch") if packages["torch"] else None
    usable = packages["torch"] is not None and torch_error is None
    gpu, gpu_error = _gpu() if usable else (None, None)
    return Facts(
        python=sys.version_info[:2],
        system=platform.system(),
        machine=platform.machine(),
        cpu=_cpu_name(),
        cpu_features=_cpu_features(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        available_bytes=available_memory(),
        packages=packages,
        torch_cuda=_torch_cuda() if usable else None,
        torch_error=torch_error,
        nvidia_hardware=_nvidia_hardware(),
        driver_cuda=_driver_cuda(),
        gpu=gpu,
        gpu_error=gpu_error,
        cuda_core=_version("cuda-core", "cuda"),
        c_compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        extension_error=_import_error("minisgl._C"),
        comm=_comm_tables(),
        store=_store(),
    )


def _version(name: str, module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return version(name)
    except PackageNotFoundError:
        return "unknown"  # there, but not put there by pip
    except (ImportError, ValueError):
        return None


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "not built" if error.name == module else str(error)
    except Exception as error:  # a broken installation may raise anything
        return f"{type(error).__name__}: {error}"
    return None


# -- the processor -------------------------------------------------------------------------------------------------


def _cpu_info(key: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), "")
    except OSError:
        return ""


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_features() -> tuple[str, ...]:
    there = (_cpu_info("flags") or _cpu_info("Features")).split()
    return tuple(name for name in CPU_FEATURES if name in there)


# -- the GPU -------------------------------------------------------------------------------------------------------


def _nvidia_hardware() -> bool:
    """Whether an NVIDIA display or compute device is on the PCI bus, driver or not, or the driver's device is there."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            kind = (device / "class").read_text().strip()
            if (device / "vendor").read_text().strip() == _NVIDIA and kind.startswith("0x03"):
                return True
        except OSError:
            continue
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()  # the latter under WSL


def _driver_cuda() -> tuple[int, int] | None:
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _gpu() -> tuple[Gpu | None, str | None]:
    """The GPU, or what went wrong with it."""
    try:
        device = detect().cuda
        if device is None:
            return None, None
        import torch

        archs = [name[3:] for name in torch.cuda.get_arch_list() if name[3:].isdigit()]
        oldest = min(((int(arch[:-1]), int(arch[-1])) for arch in archs), default=(0, 0))
        return Gpu(device, torch.cuda.mem_get_info()[0], oldest, probe_kernel(device.capability)), None
    except Exception as error:  # a GPU that is ill may raise anything
        return None, str(error)


def probe_kernel(capability: tuple[int, int]) -> float | str:
    """Milliseconds that one of our kernels takes to compile for `capability`, the cache left aside; or what failed."""
    try:
        import time

        from minisgl.kernels import nvrtc
        from minisgl.kernels.spec import registry

        build = registry()[PROBE].builds[0]
        began = time.perf_counter()
        nvrtc.compile_cubin(build, nvrtc.arch_of(capability))
        return (time.perf_counter() - began) * 1e3
    except Exception as error:  # whatever it is, it is the finding
        return str(error) or type(error).__name__


def _comm_tables() -> tuple[CommTable, ...]:
    try:
        from minisgl.distributed.paths import ANYWHERE
        from minisgl.profiling.comm_tables import cached_tables, gpu_names, ranges
    except ImportError:
        return ()
    return tuple(CommTable(gpu_names(t.machine), tuple(ranges(t, ANYWHERE))) for t in cached_tables())


# -- the default job -----------------------------------------------------------------------------------------------


def _store() -> Store | None:
    try:
        from minisgl.config import DEFAULT_MODEL
        from minisgl.gguf_file import cache_dir
        from minisgl.models.hub import ALIASES
    except ImportError:
        return None
    model, folder = ALIASES[DEFAULT_MODEL], cache_dir()
    file, error = folder / "models" / model.file, _write_error(folder)
    present = file.is_file() and file.stat().st_size == model.num_bytes
    fetch_error = None if present or error else _fetch_error(model.requirement)
    return Store(folder, error, _free_bytes(folder), file, model.num_bytes, present, fetch_error)


def _write_error(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _fetch_error(requirement: str) -> str | None:
    """Why pip would not get `requirement`; asks for the list of its versions only."""
    if importlib.util.find_spec("pip") is None:
        return "pip is not installed"
    name, _, wanted = requirement.partition("==")
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*command, "--retries", "1", "--timeout", "10"],
            capture_output=True,
            text=True,
            timeout=PIP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"pip did not answer: {error}"
    if wanted in done.stdout:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return lines[-1].removeprefix("ERROR: ") if lines else f"pip finds no {requirement}"
