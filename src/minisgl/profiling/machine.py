"""What a machine is, as far as figures depend on it; nothing here fails, what can't be found out is None."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from typing import Any

import torch

from minisgl.hardware import detect
from minisgl.kernels import cpu, nvrtc
from minisgl.types import KernelError

_QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "memory.total")
TOOLS = ("nsys", "ncu", "compute-sanitizer", "nvcc")


def environment() -> dict[str, Any]:
    """Facts by name: processor, GPUs, software, tools."""
    hardware = detect()
    facts: dict[str, Any] = {
        "cpu": hardware.cpu,
        "num_cores": hardware.num_cores,
        "memory_gb": round(hardware.memory_bytes / 1e9, 1),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": cpu.native.cpu_available_kernels() if cpu.available() else None,
        "torch_cuda": torch.version.cuda,
        "nvrtc": _nvrtc(),
        "nccl": _nccl(),
        "flashinfer": importlib.util.find_spec("flashinfer") is not None,
        "tools": {name: "installed" if shutil.which(name) else None for name in TOOLS},
        "no_cuda_reason": hardware.no_cuda_reason or None,
    }
    return facts | (gpu_facts() if hardware.cuda else {})


def gpu_facts() -> dict[str, Any]:
    """Of all GPUs that torch sees: what they are, their clocks as they are now, and how they are connected."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": p.name,
                "variant": variant(p.name),
                "capability": f"{p.major}.{p.minor}",
                "num_sms": p.multi_processor_count,
                "l2_mb": round(p.L2_cache_size / 2**20, 1),
                "memory_gb": round(p.total_memory / 1e9, 1),
                **_smi(i),
            }
        )
    return {"gpus": gpus, "topology": _run("nvidia-smi", "topo", "-m")}


def variant(name: str) -> str | None:
    """The form that a GPU's name tells: SXM, PCIe, NVL; memory with HBM3 is soldered beside an SXM module's chip."""
    for mark in ("SXM", "PCIe", "NVL"):
        if mark.lower() in name.lower():
            return mark
    return "SXM" if "HBM3" in name else None


def _smi(index: int) -> dict[str, str]:
    text = _run("nvidia-smi", "-i", str(index), f"--query-gpu={','.join(_QUERY[1:])}", "--format=csv,noheader")
    return dict(zip(_QUERY[1:], text.split(", "), strict=False)) if text else {}


def _nvrtc() -> str | None:
    try:
        return ".".join(map(str, nvrtc.nvrtc_version()))
    except KernelError:
        return None


def _nccl() -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (AttributeError, ImportError, RuntimeError):
        return None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
