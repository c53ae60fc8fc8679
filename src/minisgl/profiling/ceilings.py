"""What this machine was measured to allow: the ceilings that everything else is compared with.

On a GPU: the launch of an empty kernel in a CUDA graph with and without dependent launch, a copy of 1 GiB (read and
written), a sum over 1 GiB (read), a copy within the L2 cache, a large bf16 product, transfers to and from the host, and
to each other GPU. On a CPU: the cheapest operator's call, a sum over memory, a large product.
"""

from __future__ import annotations

import statistics
from contextlib import suppress
from pathlib import Path

import torch

from minisgl.hardware import detect
from minisgl.kernels import nvrtc
from minisgl.kernels.nvrtc import Build
from minisgl.profiling.clock import time_call, turns_us
from minisgl.profiling.replay import replay_us
from minisgl.types import KernelError

EMPTY = Build.of(str(Path(__file__).with_name("empty.cu").resolve()), "empty")
MEBI, GIBI = 1 << 20, 1 << 30


def measure_ceilings(quick: bool = False) -> dict[str, float]:
    """Everything that this device has, by name; the units are in the names."""
    return gpu_ceilings(quick) if detect().cuda else cpu_ceilings(quick)


def cpu_ceilings(quick: bool = False) -> dict[str, float]:
    """Of the processor, with torch's own threads."""
    size = 512 if quick else 1024
    a = torch.ones(size, size)
    out, small = torch.empty_like(a), torch.ones(1)
    seconds = min(time_call(lambda: torch.mm(a, a, out=out), "cpu", 5 if quick else 10))
    return {
        "call_us": statistics.median(turns_us([small.neg_], 15)),
        "cpu_gbps": memory_bandwidth("cpu", quick) / 1e9,
        "cpu_tflops": 2 * size**3 / seconds / 1e12,
    }


def gpu_ceilings(quick: bool = False) -> dict[str, float]:
    """Of CUDA device 0; the launch is left out where the compiler for the empty kernel is missing."""
    p = torch.cuda.get_device_properties(0)
    found: dict[str, float] = {}
    with suppress(KernelError, ImportError):  # `minisgl profile env` says what is missing
        found |= {"launch_us": empty_us(pdl=False), "launch_pdl_us": empty_us(pdl=True)}
    found["hbm_gbps"] = memory_bandwidth("cuda", quick) / 1e9
    found["read_gbps"] = read_bandwidth(quick) / 1e9
    found["l2_gbps"] = l2_bandwidth(found.get("launch_us", 0.0)) / 1e9
    found["bf16_tflops"] = product_rate(torch.bfloat16, 4096 if quick else 8192) / 1e12
    # datasheet: 128 fused multiply-adds a clock and multiprocessor
    found["fp32_tflops"] = p.multi_processor_count * 128 * 2 * getattr(p, "clock_rate", 1_700_000) * 1e3 / 1e12
    torch.cuda.empty_cache()
    return found


def empty_us(pdl: bool) -> float:
    """Microseconds of an empty kernel in a graph."""
    run = nvrtc.prepare(EMPTY, 0, 1, 32, pdl)
    return statistics.median(replay_us([run] * 1000))


def memory_bandwidth(device: str, quick: bool = False) -> float:
    """Bytes per second that this device reads (CPU: a sum) or reads and writes (GPU: a copy); the best of several."""
    if device == "cuda":
        source = torch.empty(GIBI, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / min(time_call(lambda: target.copy_(source), device, 10))
    source = torch.ones(32 * MEBI if quick else 128 * MEBI)
    return source.numel() * 4 / min(time_call(source.sum, device, 5))


def read_bandwidth(quick: bool = False) -> float:
    """Bytes per second that a GPU reads: a sum over 1 GiB."""
    source = torch.ones(GIBI // 4, device="cuda")
    return source.nbytes / min(time_call(source.sum, "cuda", 5 if quick else 10))


def l2_bandwidth(launch_us: float) -> float:
    """Bytes per second, read and written, of a copy that stays in the L2 cache; its launch is subtracted."""
    source = torch.empty(8 * MEBI, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    us = statistics.median(replay_us([lambda: target.copy_(source)] * 200))
    return 2 * source.numel() / (us - launch_us) * 1e6


def product_rate(dtype: torch.dtype, size: int) -> float:
    """Operations per second of a product of two square matrices on the GPU."""
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    out = torch.empty_like(a)
    return float(2 * size**3 / min(time_call(lambda: torch.mm(a, a, out=out), "cuda", 10)))


def host_transfers() -> dict[str, float]:
    """GB/s between pinned memory and the GPU (`h2d_gbps`, `d2h_gbps`)."""
    host = torch.empty(256 * MEBI, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    to = min(time_call(lambda: device.copy_(host, non_blocking=True), "cuda", 5))
    back = min(time_call(lambda: host.copy_(device, non_blocking=True), "cuda", 5))
    return {"h2d_gbps": host.nbytes / to / 1e9, "d2h_gbps": host.nbytes / back / 1e9}


def peer_transfers() -> list[list[float | None]]:
    """GB/s from GPU i to GPU j, one direction at a time; None on the diagonal. Empty with fewer than two GPUs."""
    count = torch.cuda.device_count()
    if count < 2:
        return []
    blocks = [torch.empty(256 * MEBI, dtype=torch.uint8, device=f"cuda:{i}") for i in range(count)]

    def rate(i: int, j: int) -> float:
        with torch.cuda.device(i):
            seconds = min(time_call(lambda: blocks[j].copy_(blocks[i], non_blocking=True), "cuda", 5))
        return blocks[i].nbytes / seconds / 1e9

    return [[None if i == j else rate(i, j) for j in range(count)] for i in range(count)]
