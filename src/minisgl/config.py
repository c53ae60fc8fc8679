"""Frozen configuration. `resolve` turns what a user asked for into what this machine will run."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from minisgl.hardware import Hardware
from minisgl.types import ConfigError

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
KV_CACHE_DTYPES = ("auto", "fp8")
POLICIES = ("fcfs", "lpm")
FUSED = ("auto", "on", "off")
SAMPLING_DEFAULTS = ("model", "neutral")
DEFAULT_MODEL = "smollm2"


def _need(config: EngineConfig | ServerConfig, ok: bool, name: str, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name.replace('_', '-')} is {getattr(config, name)!r}; expected {expected}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine is to run. None or 'auto' leave the choice to `resolve` or to the engine at start."""

    model: str = DEFAULT_MODEL  # alias, folder, .gguf file, hub id or modelscope:ORG/NAME
    device: str = "auto"
    dtype: str = "auto"
    dummy_weights: bool = False  # random weights; the folder needs only a config.json
    tp_size: int = 1  # ranks that the model is split over, each a process: GPUs, or parts of a CPU
    seed: int = 0  # of dummy weights and of requests that bring no seed

    page_size: int = 16  # tokens
    kv_cache_dtype: str = "auto"  # of keys and values; auto: as dtype, fp8: e4m3, scaled by KV head
    num_pages: int | None = None  # KV pages; None: as many as memory allows
    mem_fraction: float = 0.9  # of the device's free memory, for weights, activations and KV pool together
    max_model_len: int | None = None  # prompt + output tokens of a request; None: the model's context
    max_running: int | None = None
    max_batched_tokens: int | None = None  # tokens computed in one step
    policy: str = "fcfs"  # order of the waiting queue: first come first served, or longest prefix match
    prefix_cache: bool = True
    overlap: bool | None = None  # schedule and launch a step while the one before it runs; None: on a GPU
    attention: str = "auto"
    fused_kernels: str = "auto"  # the project's CUDA kernels between a layer's matrix products; auto: where they run
    cuda_graph: bool = True  # replay steps as CUDA graphs, where there is a GPU
    cuda_graph_max_batch: int | None = None  # requests in the largest graph; None: max_running

    def __post_init__(self) -> None:
        need = partial(_need, self)
        need(self.device in ("auto", *DEVICES), "device", "auto, cpu or cuda")
        need(self.dtype in ("auto", *DTYPES), "dtype", "auto, " + ", ".join(DTYPES))
        need(self.kv_cache_dtype in KV_CACHE_DTYPES, "kv_cache_dtype", " or ".join(KV_CACHE_DTYPES))
        need(self.policy in POLICIES, "policy", " or ".join(POLICIES))
        need(self.fused_kernels in FUSED, "fused_kernels", "auto, on or off")
        need(1 <= self.page_size <= 1024, "page_size", "1 to 1024 tokens")
        need(0 < self.mem_fraction <= 1, "mem_fraction", "a number above 0, up to 1")
        need(self.tp_size >= 1, "tp_size", "at least 1")
        for name in ("num_pages", "max_model_len", "max_running", "max_batched_tokens", "cuda_graph_max_batch"):
            value = getattr(self, name)
            need(value is None or value >= 1, name, "at least 1")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the HTTP server is to offer."""

    host: str = "127.0.0.1"
    port: int = 1919
    served_model_name: str | None = None  # None: the model as given to --model
    max_queue: int = 1024  # requests waiting or running, at most
    api_key: str | None = field(default=None, repr=False)
    cors: str | None = None  # origins, by commas, whose pages may call; * for any
    client_timeout: float = 30.0  # seconds for a client to send a request, and for leaving an answer unread
    drain_timeout: float = 60.0  # seconds that answers under way have to end when the server is told to
    sampling_defaults: str = "model"  # for what a request doesn't say: the model's own values, or neutral ones
    profile: str | None = None  # folder for the traces of /profile/start and /profile/stop; None: they are off

    def __post_init__(self) -> None:
        need = partial(_need, self)
        need(0 <= self.port <= 65535, "port", "0 (any free one) to 65535")
        need(self.max_queue >= 1, "max_queue", "at least 1")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError("api-key is empty or not printable ASCII; leave it out to serve without a key")
        for name in ("client_timeout", "drain_timeout"):
            need(0 < getattr(self, name) < 1e6, name, "seconds above 0")
        need(self.sampling_defaults in SAMPLING_DEFAULTS, "sampling_defaults", "model or neutral")


def _installed(*packages: str) -> bool:
    return all(find_spec(name) is not None for name in packages)


def triton_runs() -> bool:
    """Whether Triton is there, and the C compiler that it builds its launchers with."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return _installed("triton") and any(shutil.which(name) for name in compilers)


def _fused(config: EngineConfig, device: str, hardware: Hardware) -> str:
    """'on' or 'off'. Where 'auto' finds a GPU that could do better, it says what is missing."""
    reason = "they need a GPU"
    if device == "cuda":
        reason = "" if hardware.cuda and hardware.cuda.capability >= (8, 0) else "they need compute capability 8.0"
        if not _installed("cuda", "cuda.core"):
            reason = "the package cuda-core is missing: pip install 'minisgl[cuda]'"
    if config.fused_kernels == "on" and reason:
        raise ConfigError(f"fused-kernels is on, but {reason}; use --fused-kernels auto")
    if config.fused_kernels == "auto" and reason and device == "cuda":
        log.warning("fused kernels are off: %s", reason)
    return "off" if reason else config.fused_kernels.replace("auto", "on")


def resolve(config: EngineConfig, hardware: Hardware) -> EngineConfig:
    """A configuration without 'auto' in it, fit for `hardware`.

    Raises:
        ConfigError: what was asked for can't run here.
    """
    changes: dict[str, Any] = {}
    device = config.device
    if device == "auto":
        device = "cuda" if hardware.cuda is not None else "cpu"
    if device == "cuda" and hardware.cuda is None:
        raise ConfigError(f"device cuda was asked for, but {hardware.no_cuda_reason}; use --device cpu")
    changes["device"] = device
    changes["overlap"] = device == "cuda" if config.overlap is None else config.overlap
    if config.dtype == "auto":
        half = "bfloat16" if hardware.cuda is not None and hardware.cuda.capability >= (8, 0) else "float16"
        changes["dtype"] = half if device == "cuda" else "float32"
    if device == "cuda" and config.tp_size > max(hardware.num_gpus, 1):
        raise ConfigError(f"tp is {config.tp_size}, one GPU a rank, and this machine has {hardware.num_gpus}")
    running = config.max_running or (256 if device == "cuda" else 32)
    batched = config.max_batched_tokens or (16384 if device == "cuda" else 2048)
    if config.max_batched_tokens is not None and config.max_running is None:
        running = min(running, batched)
    if batched < running:
        raise ConfigError(
            f"max-batched-tokens is {batched}, less than max-running {running}; "
            "a step must have room for one token of every running request"
        )
    changes["max_running"], changes["max_batched_tokens"] = running, batched
    changes["fused_kernels"] = _fused(config, device, hardware)
    dtype = changes.get("dtype", config.dtype)
    changes["attention"] = _attention(config, device, dtype, hardware)
    return replace(config, **changes)


def _attention(config: EngineConfig, device: str, dtype: str, hardware: Hardware) -> str:
    """The attention backend asked for, or the best that runs here. Some can't read what the cache is to hold."""
    fp8, gpu = config.kv_cache_dtype == "fp8", hardware.cuda
    cpu_kernels = device == "cpu" and dtype == "float32" and hardware.extension
    unfit = {}
    if fp8:
        unfit["cpu"] = "the C++ kernels read a float32 cache"
        unfit["flashinfer"] = "its kernels take one scale for all KV heads"
    if fp8 and gpu is not None and gpu.capability < (9, 0):
        unfit["triton"] = "Triton converts FP8 to bfloat16 from compute capability 9.0 on"
    name = config.attention
    if name == "auto":
        triton = gpu is not None and gpu.capability >= (8, 0) and triton_runs()
        name = ("triton" if triton else "torch_sdpa") if device == "cuda" else "cpu" if cpu_kernels else "torch_sdpa"
        if name in unfit:
            log.warning("attention is torch_sdpa, not %s: kv-cache-dtype is fp8, and %s", name, unfit[name])
            return "torch_sdpa"
    if name == "cpu" and not cpu_kernels:
        raise ConfigError("attention cpu needs device cpu, dtype float32 and the C++ extension; use torch_sdpa")
    if name in unfit:
        raise ConfigError(f"attention {name} can't serve kv-cache-dtype fp8: {unfit[name]}; use --attention torch_sdpa")
    return name
