"""Attention as the engine calls it, over batches and lengths: each backend beside what bytes and operations allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisgl.attention import NAMES, make_attention
from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import FP8, KVPool
from minisgl.profiling.clock import calls_us, spread, time_call
from minisgl.profiling.record import Record
from minisgl.profiling.roofline import Ceilings, floor, gbps, tflops
from minisgl.profiling.sweep import memory_of
from minisgl.types import MinisglError

COLD_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # of keys and values in rotation
MODELS = {"qwen3-0.6b": (16, 8, 128), "qwen3-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}  # heads, KV heads, head_dim


@dataclass(frozen=True)
class Workload:
    """One step's attention. `lens`: tokens in the pool, `counts`: those of them that are this step's queries."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    lens: tuple[int, ...]
    counts: tuple[int, ...]
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    fp8: bool = False  # keys and values; the dtype is that of the queries

    @property
    def phase(self) -> str:
        return "decode" if all(count == 1 for count in self.counts) else "prefill"

    @property
    def layer_bytes(self) -> int:
        """Keys and values that are read, with queries and outputs."""
        kv = 2 * sum(self.lens) * self.kv_heads * self.dim * (1 if self.fp8 else self.dtype.itemsize)
        return kv + 2 * sum(self.counts) * self.heads * self.dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the two matrix products, over the keys that causality leaves."""
        pairs = sum(c * (n - c) + c * (c + 1) // 2 for n, c in zip(self.lens, self.counts, strict=True))
        return 4 * pairs * self.heads * self.dim

    @property
    def num_layers(self) -> int:
        """Layers of the pool: as many as exceed the caches."""
        return min(max(-(-COLD_BYTES[self.device] // self.layer_bytes), 2), 128)

    def batch(self, backend: AttentionBackend) -> ForwardBatch:
        """Random keys and values on pages in random order, in `num_layers` layers."""
        needed = [-(-n // self.page_size) for n in self.lens]
        shape = (self.num_layers, self.kv_heads, self.dim, self.page_size, sum(needed))
        pool = KVPool(*shape, FP8 if self.fp8 else self.dtype, self.device)
        for half in (pool.k, pool.v):
            half.view(torch.uint8).random_(0, 0x40) if self.fp8 else half.normal_()  # FP8: bytes of 0 to 2
        pages = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
        table = np.zeros((len(needed), max(needed)), np.int32)
        for row, chunk in zip(table, np.split(pages, np.cumsum(needed)[:-1]), strict=True):
            row[: len(chunk)] = chunk
        ids = torch.zeros(sum(self.counts), dtype=torch.int32, device=self.device)
        batch = ForwardBatch(
            input_ids=ids,
            positions=ids,
            slots=ids.long(),
            page_table=torch.from_numpy(table).to(self.device),
            seq_lens=torch.tensor(self.lens, dtype=torch.int32, device=self.device),
            query_starts=torch.tensor([0, *np.cumsum(self.counts)], dtype=torch.int32, device=self.device),
            logits_indices=ids.long(),
            num_decodes=sum(c == 1 for c in self.counts),
            seq_lens_host=np.array(self.lens, np.int32),
            query_lens_host=np.array(self.counts, np.int32),
            pool=pool,
            attention=backend,
        )
        backend.prepare(batch)
        return batch

    def queries(self) -> Tensor:
        return torch.randn(sum(self.counts), self.heads, self.dim, dtype=self.dtype, device=self.device)


def decodes(model: str, sizes: Sequence[tuple[int, int]], **more: Any) -> Iterator[Workload]:
    """One query each for (batch, context) in `sizes`."""
    for batch, context in sizes:
        yield Workload(f"decode {batch} x {context}", *MODELS[model], (context,) * batch, (1,) * batch, **more)


def prefills(model: str, sizes: Sequence[tuple[int, int, int]], **more: Any) -> Iterator[Workload]:
    """(sequences, tokens, cached tokens before them) in `sizes`."""
    for count, tokens, prefix in sizes:
        name = f"prefill {count} x {tokens}" + f" over {prefix}" * bool(prefix)
        yield Workload(name, *MODELS[model], (prefix + tokens,) * count, (tokens,) * count, **more)


def layer_calls(work: Workload, batch: ForwardBatch) -> list[Callable[[], Tensor]]:
    """Attention of each layer, as a model asks for it."""
    q, scale = work.queries(), work.dim**-0.5
    return [
        lambda layer=layer: batch.attention.forward(q, layer, batch, scale, None)  # type: ignore[misc]
        for layer in range(batch.pool.num_layers)
    ]


def backends(device: str, record: Record) -> list[AttentionBackend]:
    """Those that work here; the others are noted in `record`, with the reason."""
    found = []
    for name in NAMES:
        try:
            if name == "cpu" and device != "cpu":
                raise MinisglError("it serves the CPU")
            if name == "cpu":
                from minisgl.kernels.cpu import available

                if not available():
                    raise MinisglError("the C++ extension isn't installed")
            elif name != "torch_sdpa" and device == "cpu":
                raise MinisglError("it needs an NVIDIA GPU")
            found.append(make_attention(name))
        except MinisglError as error:
            record.skip(f"attention {name}", str(error))
    return found


def measure(work: Workload, backend: AttentionBackend, ceilings: Ceilings, samples: int) -> dict[str, Any]:
    """One row: microseconds a layer, beside the floor of the workload.

    On a GPU from a CUDA graph, or between events, host time included, for a backend that can't be captured.
    """
    calls = layer_calls(work, work.batch(backend))
    if work.device == "cuda" and not backend.capturable:
        turn = cycle(calls)
        us = spread([seconds * 1e6 for seconds in time_call(lambda: next(turn)(), "cuda", samples)])
    else:
        us = spread(calls_us(calls, work.device, samples))
    rate = "bf16_tflops" if work.device == "cuda" else "cpu_tflops"
    memory = memory_of(work.num_layers * work.layer_bytes)
    least = floor(work.layer_bytes, work.flops, ceilings, memory, rate)
    return {
        "kernel": "attention",
        "version": backend.name,
        "backend": backend.name,
        "phase": work.phase,
        "case": {"batch": len(work.lens), "tokens": work.counts[0], "context": work.lens[0], "heads": work.heads,
                 "kv_heads": work.kv_heads, "head_dim": work.dim},
        "dtype": str(work.dtype).removeprefix("torch."),
        "config": None,
        "us": us,
        "bytes": work.layer_bytes,
        "flops": work.flops,
        "gbps": gbps(work.layer_bytes, us["median"]),
        "tflops": tflops(work.flops, us["median"]),
        "floor_us": least.us,
        "limit": least.limit,
        "fraction": least.fraction(us["median"]),
    }  # fmt: skip
