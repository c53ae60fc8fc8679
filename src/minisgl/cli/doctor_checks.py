"""From what a machine is to what will run on it, why not the rest, and the command that mends it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from minisgl.cli.doctor_facts import PACKAGES, CommTable, Facts, Gpu, Store

Status = Literal["ok", "note", "fail"]
GIB = 1 << 30
MEMORY = int(1.4 * GIB)  # the default job's peak, while it loads, is 1.3 GiB
GPU_MEMORY = 1 * GIB  # weights, activations of the largest step, and a small KV pool
MEM_FRACTION = 0.9  # as EngineConfig has it
DISK_FACTOR = 2.2  # the model is there twice while it is unpacked
CUDA_13_DRIVER = "580"
PIP = f"{sys.executable} -m pip install"


@dataclass(frozen=True)
class Check:
    """A finding. `note`: something optional is missing; `fail`: the default job would not run. `fix` mends it."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def diagnose(facts: Facts) -> list[Check]:
    """Every finding, in the order in which to read them."""
    checks = [_system(facts), _cpu(facts), _memory(facts), _gpu(facts)]
    checks += [*_packages(facts), _extension(facts)]
    if facts.gpu is not None:
        checks += [_gpu_memory(facts.gpu), _kernels(facts, facts.gpu), _triton(facts)]
        checks += [_communication(table) for table in facts.comm]
    return checks if facts.store is None else [*checks, _folder(facts.store), _model(facts.store)]


def runs_on(facts: Facts) -> str:
    """The device that the default job takes."""
    return "the CPU" if facts.gpu is None else f"the GPU ({facts.gpu.device.name})"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


# -- the machine ---------------------------------------------------------------------------------------------------


def _system(facts: Facts) -> Check:
    found = f"{facts.system} {facts.machine}, Python {facts.python[0]}.{facts.python[1]}"
    if facts.system != "Linux":
        return Check("system", "fail", f"{found}; minisgl runs on Linux", "use Linux, WSL 2 or a Linux container")
    if facts.python < (3, 11):
        return Check("system", "fail", f"{found}; minisgl needs Python 3.11 or later", "python3.11 -m venv .venv")
    return Check("system", "ok", found)


def _cpu(facts: Facts) -> Check:
    cores = f"{facts.num_cores} core{'s' if facts.num_cores != 1 else ''}"
    found = ", ".join(filter(None, [facts.cpu, cores, " ".join(facts.cpu_features)]))
    if facts.machine in ("x86_64", "AMD64") and "avx2" not in facts.cpu_features:
        return Check("CPU", "note", f"{found}; without AVX2 everything is slow")
    return Check("CPU", "ok", found)


def _memory(facts: Facts) -> Check:
    if not facts.available_bytes:
        return Check("memory", "note", f"{_gib(facts.memory_bytes)}; how much of it is free is unknown")
    found = f"{_gib(facts.available_bytes)} of {_gib(facts.memory_bytes)} available"
    if facts.available_bytes < MEMORY:
        text = f"{found}; the default job takes {_gib(MEMORY)}"
        return Check("memory", "fail", text, "end other programs, or raise the limit of this container")
    return Check("memory", "ok", found)


def _gpu(facts: Facts) -> Check:
    """Each case of a GPU that can't be used has its own remedy; none keeps the default job from the CPU."""
    if facts.gpu is not None:
        return _usable_gpu(facts.gpu)
    if not facts.nvidia_hardware:
        return Check("GPU", "ok", "no NVIDIA GPU here: everything runs on the CPU")
    if facts.driver_cuda is None:
        text = "there is an NVIDIA GPU, but its driver isn't loaded"
        return Check("GPU", "note", text, f"sudo apt-get install nvidia-driver-{CUDA_13_DRIVER}  # and restart")
    driver = ".".join(map(str, facts.driver_cuda))
    if facts.torch_cuda is None:
        why = "torch is missing" if facts.packages.get("torch") is None else "the installed torch is built without CUDA"
        text = f"there is an NVIDIA GPU (driver for CUDA {driver}), but {why}"
        return Check("GPU", "note", text, _install_torch(facts.driver_cuda))
    if int(facts.torch_cuda.split(".")[0]) > facts.driver_cuda[0]:
        text = f"the driver is too old: it runs CUDA up to {driver}, and torch was built for {facts.torch_cuda}"
        fix = f"{_install_torch(facts.driver_cuda)}; or a driver from {CUDA_13_DRIVER} on"
        return Check("GPU", "note", text, fix)
    text = f"torch (CUDA {facts.torch_cuda}) can't use the GPU, though its driver runs CUDA {driver}"
    if facts.gpu_error is not None:
        text += f": {facts.gpu_error}"
    fix = "nvidia-smi  # shows whether the driver works; in a container, start it with --gpus all"
    return Check("GPU", "note", text, fix)


def _usable_gpu(gpu: Gpu) -> Check:
    device = gpu.device
    major, minor = device.capability
    found = f"{device.name}, compute capability {major}.{minor}, {device.num_sms} SMs, {_gib(device.memory_bytes)}"
    if device.capability < gpu.oldest_supported:
        oldest = ".".join(map(str, gpu.oldest_supported))
        text = f"{found}; this torch has code for {oldest} and later only"
        return Check("GPU", "fail", text, f"{_install_torch((12, 6))}; or add --device cpu to every command")
    return Check("GPU", "ok", found)


def _install_torch(driver_cuda: tuple[int, int]) -> str:
    """A build of torch that the driver runs; CUDA 12.x builds run on every driver of CUDA 12."""
    build = "cu130" if driver_cuda >= (13, 0) else "cu126"
    return f"install torch's {build} build: pytorch.org, Get started, has the command"


def _gpu_memory(gpu: Gpu) -> Check:
    total = gpu.device.memory_bytes
    found = f"{_gib(gpu.free_bytes)} of {_gib(total)} free"
    if gpu.free_bytes - (1 - MEM_FRACTION) * total < GPU_MEMORY:
        text = f"{found}; other programs hold the rest"
        return Check("GPU memory", "fail", text, "nvidia-smi  # lists them; or add --device cpu to every command")
    return Check("GPU memory", "ok", found)


# -- the software --------------------------------------------------------------------------------------------------


def _packages(facts: Facts) -> Iterator[Check]:
    wanted = {name: oldest for name, (_, oldest) in PACKAGES.items()}
    missing = [name for name in wanted if facts.packages.get(name) is None]
    old = [n for n, v in facts.packages.items() if v is not None and v[0].isdigit() and _key(v) < _key(wanted[n])]
    if missing or old:
        told = [f"missing: {', '.join(missing)}"] if missing else []
        told += [f"{name} is {facts.packages[name]}, older than {wanted[name]}" for name in old]
        fix = f"{PIP} " + " ".join(f"'{name}>={wanted[name]}'" for name in [*missing, *old])
        yield Check("packages", "fail", "; ".join(told), fix)
    else:
        yield Check("packages", "ok", f"all {len(wanted)} are here; torch {facts.packages['torch']}")
    if facts.torch_error is not None:
        yield Check("torch", "fail", f"can't be imported: {facts.torch_error}", f"{PIP} --force-reinstall torch")


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _extension(facts: Facts) -> Check:
    if facts.extension_error is None:
        return Check("C++ extension", "ok", "built")
    text = f"{facts.extension_error}: prefix cache and CPU attention run in Python, which is slower"
    fix = f"sudo apt-get install g++ python3-dev && {PIP} --force-reinstall --no-deps .  # in minisgl's sources"
    return Check("C++ extension", "note", text, fix)


def _kernels(facts: Facts, gpu: Gpu) -> Check:
    extra = f"{PIP} 'minisgl[cuda]'  # in the sources: {PIP} '.[cuda]'"
    if facts.cuda_core is None:
        return Check("CUDA kernels", "note", "the extra 'cuda' isn't installed: torch's own operators serve", extra)
    if isinstance(gpu.probe, str):
        return Check("CUDA kernels", "note", f"the probe doesn't compile: {gpu.probe}", extra)
    return Check("CUDA kernels", "ok", f"NVRTC compiles the probe in {gpu.probe:.0f} ms")


def _triton(facts: Facts) -> Check:
    if facts.c_compiler is None:
        text = "no C compiler, which Triton builds its launchers with: torch's own operators serve"
        return Check("Triton", "note", text, "sudo apt-get install gcc python3-dev")
    return Check("Triton", "ok", f"builds its launchers with {facts.c_compiler}")


def _communication(table: CommTable) -> Check:
    """Which way all-reduces go, as measured when such a group first started; `profile comm` measures anew."""
    ways = ", ".join(f"{path} up to {_size(num_bytes)}" for num_bytes, path in table.ranges)
    return Check(f"all-reduce, {len(table.gpus)} × {table.gpus[0]}", "ok", ways or "direct")


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 10} KiB" if num_bytes < 1 << 20 else f"{num_bytes >> 20} MiB"


# -- the default job -----------------------------------------------------------------------------------------------


def _folder(store: Store) -> Check:
    if store.folder_error is not None:
        text = f"{store.folder} can't be written: {store.folder_error}"
        status: Status = "note" if store.model_present else "fail"
        return Check("cache folder", status, text, "export MINISGL_CACHE=/a/folder/that/can/be/written")
    return Check("cache folder", "ok", f"{store.folder}, {_gib(store.free_bytes)} free")


def _model(store: Store) -> Check:
    size = f"{store.model_bytes / 1e6:.0f} MB"
    if store.model_present:
        return Check("default model", "ok", f"{store.model.name}, {size}, is here")
    found = f"{store.model.name} isn't here yet"
    if store.folder_error is not None:
        return Check("default model", "fail", f"{found}, and there is no place for it", "mend the cache folder first")
    if store.free_bytes < DISK_FACTOR * store.model_bytes:
        text = f"{found}, and the disk is too full for it ({size})"
        return Check("default model", "fail", text, f"make room in {store.folder}, or set MINISGL_CACHE")
    if store.fetch_error is not None:
        text = f"{found}, and can't be fetched: {store.fetch_error}"
        by_hand = f"or copy it from elsewhere to {store.model}"
        return Check("default model", "fail", text, f"{sys.executable} -m pip config list  # which index; {by_hand}")
    return Check("default model", "ok", f"{found}; the first run fetches it ({size})")
