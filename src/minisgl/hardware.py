"""What this machine is."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One CUDA GPU."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    l2_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine as the engine sees it."""

    cpu: str
    num_cores: int  # that this process may use
    memory_bytes: int
    cuda: CudaDevice | None
    no_cuda_reason: str = ""
    extension: bool = False  # whether the C++ extension is installed
    num_gpus: int = 0  # that torch sees; `cuda` is the first of them


def read_text(path: str) -> str:
    """What a file of the system says; empty where it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cpu_name() -> str:
    named = re.search(r"^model name\s*:(.*)", read_text("/proc/cpuinfo"), re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes that this process may still take without swapping, its cgroup's limit included; 0 if unknown."""
    told = re.search(r"^MemAvailable:\s*(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    available = int(told[1]) * 1024 if told else 0
    limit, used = (read_text(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():  # without a limit it says "max"
        available = min(available, max(int(limit) - int(used), 0))
    return available


@cache
def detect() -> Hardware:
    """Looks at the machine once; later calls return the same answer."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device, reason = None, ""
    if torch.version.cuda is None:
        reason = "the installed torch has no CUDA support"
    elif not torch.cuda.is_available():
        reason = "torch sees no CUDA GPU (no GPU, or no driver that fits)"
    else:
        p = torch.cuda.get_device_properties(0)
        device = CudaDevice(p.name, (p.major, p.minor), p.multi_processor_count, p.L2_cache_size, p.total_memory)
    extension = importlib.util.find_spec("minisgl._C") is not None
    num_gpus = torch.cuda.device_count() if device is not None else 0
    return Hardware(_cpu_name(), len(os.sched_getaffinity(0)), memory, device, reason, extension, num_gpus)
