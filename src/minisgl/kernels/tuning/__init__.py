"""Launch configurations: measured ones from a table for the GPU's architecture, else from a simple model of the GPU.

The tables are JSON files: `sm_90.json` beside this module was measured on an H100; `minisgl profile tune` measures the
GPU at hand and writes one to the user's cache, which is preferred.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from minisgl.gguf_file import cache_dir
from minisgl.types import KernelError

Table = Mapping[str, Mapping[int, tuple[int, int]]]  # kernel or product → bucket → (threads, work)


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel is launched."""

    threads: int  # in a block
    work: int  # independent vectors, rows or heads that a thread has in flight
    pdl: bool = True  # programmatic dependent launch, where the GPU has it


def bucket(num_bytes: int) -> int:
    """Calls are tuned by the bytes they move, rounded up to a power of two: the bucket is its exponent."""
    return max(num_bytes - 1, 1).bit_length()


def analytic(num_bytes: int, num_sms: int) -> Config:
    """The configuration without a table: as much work a thread as still leaves eight warps a multiprocessor.

    Fewer warps can't keep the memory busy; more vectors a thread amortise index arithmetic and id loads.
    """
    warps_at_one = num_bytes // (2 * 16 * 32)  # half of the bytes are read, 16 at a time by 32 lanes
    work = 1
    while work < 4 and warps_at_one // (2 * work) >= 8 * num_sms:
        work *= 2
    return Config(threads=128 if warps_at_one >= num_sms else 64, work=work)


def table_paths(arch: str) -> tuple[Path, Path]:
    """Where the table for `arch` may lie: the user's own, then the one that is shipped."""
    return cache_dir() / "tuning" / f"{arch}.json", Path(__file__).with_name(f"{arch}.json")


def read_table(path: Path) -> Table:
    """Reads a table.

    Raises:
        KernelError: the file isn't one.
    """
    try:
        kernels = json.loads(path.read_text())["kernels"]
        return {
            name: {int(b): (int(threads), int(work)) for b, (threads, work) in rows.items()}
            for name, rows in kernels.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise KernelError(f"{path} is no tuning table ({e!r}); delete it or run `minisgl profile tune` again") from e


@cache
def _table(arch: str) -> Table:
    for path in table_paths(arch):
        if path.is_file():
            return read_table(path)
    return {}


def from_table(table: Table, kernel: str, num_bytes: int) -> Config | None:
    """The entry of the nearest bucket; None if the kernel isn't in the table."""
    rows = table.get(kernel)
    if not rows:
        return None
    nearest = min(rows, key=lambda b: abs(b - bucket(num_bytes)))
    return Config(*rows[nearest])


def choose(kernel: str, device: int, num_bytes: int) -> Config:
    """The configuration for a call of `kernel` that moves `num_bytes` on CUDA device `device`."""
    properties = torch.cuda.get_device_properties(device)
    measured = from_table(_table(f"sm_{properties.major}{properties.minor}"), kernel, num_bytes)
    return measured or analytic(num_bytes, properties.multi_processor_count)


def batch_bucket(rows: int) -> int:
    """Products are tuned by rows of activations: one, or rounded up to a power of two from 8 on."""
    return 1 if rows == 1 else max(8, 1 << (rows - 1).bit_length())


@cache
def choose_product(product: str, device: int, rows: int) -> Config | None:
    """The configuration of a matrix product that beat cuBLAS where it was measured; None: it didn't, or wasn't."""
    major, minor = torch.cuda.get_device_capability(device)
    found = _table(f"sm_{major}{minor}").get(product, {}).get(batch_bucket(rows))
    return Config(*found) if found else None
