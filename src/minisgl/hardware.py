"""What this machine is."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from functools import cache


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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes that this process may still take without swapping, its cgroup's limit included; 0 if unknown."""
    available = 0
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
    except OSError:
        return 0
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as f:
            limit = f.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="utf-8") as f:
            used = int(f.read())
        if limit != "max":
            available = min(available, max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass
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
