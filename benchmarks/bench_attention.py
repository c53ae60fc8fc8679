"""Triton attention on a GPU: decode against memory bandwidth, prefill beside torch's own flash attention and cuDNN.

    python benchmarks/bench_attention.py [--models qwen3-0.6b] [--no-save]

Times are per call from the replay of a CUDA graph over the layers of a pool of 256 MB and more, so that no call finds
its keys and values in the L2 cache. What torch is given lies contiguous already: its flash attention reads no pages of
16 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import append_line, environment, memory_bandwidth, spread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minisgl.attention import make_attention
from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.profiling.replay import replay_us

COLD_BYTES = 256 << 20
MODELS = {"qwen3-0.6b": (16, 8, 128), "qwen3-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}  # heads, KV heads, head_dim


@dataclass(frozen=True)
class Workload:
    """One step's attention."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    lens: tuple[int, ...]
    counts: tuple[int, ...]
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def layer_bytes(self) -> int:
        """Keys and values that are read, with queries and outputs."""
        kv = 2 * sum(self.lens) * self.kv_heads * self.dim
        return (kv + 2 * sum(self.counts) * self.heads * self.dim) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the two matrix products, over the keys that causality leaves."""
        pairs = sum(c * (n - c) + c * (c + 1) // 2 for n, c in zip(self.lens, self.counts, strict=True))
        return 4 * pairs * self.heads * self.dim

    def batch(self, backend: AttentionBackend) -> ForwardBatch:
        """Random keys and values on pages in random order, in as many layers as exceed the L2 cache."""
        needed = [-(-n // self.page_size) for n in self.lens]
        layers = min(max(-(-COLD_BYTES // self.layer_bytes), 2), 128)
        pool = KVPool(layers, self.kv_heads, self.dim, self.page_size, sum(needed), self.dtype, "cuda")
        pool.k.normal_()
        pool.v.normal_()
        pages = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
        table = np.zeros((len(needed), max(needed)), np.int32)
        for row, chunk in zip(table, np.split(pages, np.cumsum(needed)[:-1]), strict=True):
            row[: len(chunk)] = chunk
        ids = torch.zeros(sum(self.counts), dtype=torch.int32, device="cuda")
        batch = ForwardBatch(
            input_ids=ids,
            positions=ids,
            slots=ids.long(),
            page_table=torch.from_numpy(table).cuda(),
            seq_lens=torch.tensor(self.lens, dtype=torch.int32, device="cuda"),
            query_starts=torch.tensor([0, *np.cumsum(self.counts)], dtype=torch.int32, device="cuda"),
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
        return torch.randn(sum(self.counts), self.heads, self.dim, dtype=self.dtype, device="cuda")


def decodes(model: str) -> Iterator[Workload]:
    """Batches at the context of the engine's benchmark, long ones, and ragged ones of the same mean."""
    for batch, context in ((1, 672), (8, 672), (32, 672), (128, 672), (256, 672), (1, 4096)):
        yield Workload(f"decode {batch} x {context}", *MODELS[model], (context,) * batch, (1,) * batch)
    ragged = tuple(np.random.default_rng(0).integers(100, 1245, 256).tolist())
    yield Workload("decode 256 x 100..1244", *MODELS[model], ragged, (1,) * 256)


def prefills(model: str) -> Iterator[Workload]:
    for count, tokens, prefix in ((32, 512, 0), (8, 2048, 0), (4, 4000, 0), (1, 2048, 2048), (8, 256, 2048)):
        name = f"prefill {count} x {tokens}" + f" over {prefix}" * bool(prefix)
        yield Workload(name, *MODELS[model], (prefix + tokens,) * count, (tokens,) * count)


def triton_calls(work: Workload, batch: ForwardBatch) -> list[Callable[[], Tensor]]:
    q, scale = work.queries(), work.dim**-0.5
    return [
        lambda layer=layer: batch.attention.forward(q, layer, batch, scale, None)  # type: ignore[misc]
        for layer in range(batch.pool.num_layers)
    ]


def gather(work: Workload, batch: ForwardBatch, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all sequences (of one length), [tokens, kv_heads, head_dim], contiguous."""
    pages = batch.page_table.flatten()
    k, v = (x[layer].index_select(0, pages) for x in (batch.pool.k, batch.pool.v))
    shape = (len(work.lens), -1, work.kv_heads, work.dim)
    k, v = (x.view(shape)[:, : work.lens[0]].reshape(-1, *shape[2:]) for x in (k, v))
    return k, v


def torch_calls(work: Workload, batch: ForwardBatch) -> dict[str, Callable[[], Tensor]]:
    """What torch offers for the same prefill, over keys and values that were gathered before, or with the gather."""
    q, scale = work.queries(), work.dim**-0.5
    k, v = gather(work, batch, 0)
    lens = torch.tensor([0, *np.cumsum(work.lens)], dtype=torch.int32, device="cuda")
    sizes = (batch.query_starts, lens, work.counts[0], work.lens[0])
    dense = [x.view(len(work.lens), -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]

    def flash(k: Tensor, v: Tensor) -> Tensor:
        result = torch.ops.aten._flash_attention_forward(q, k, v, *sizes, 0.0, True, False, scale=scale)
        return result[0]  # type: ignore[no-any-return]

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*dense, is_causal=True, scale=scale, enable_gqa=True)

    calls: dict[str, Callable[[], Tensor]] = {
        "torch flash": lambda: flash(k, v),
        "torch flash, gathered": lambda: flash(*gather(work, batch, 0)),
    }
    return calls | ({"cudnn": cudnn} if work.counts == work.lens else {})


def measure(name: str, calls: list[Callable[[], Tensor]], work: Workload, bandwidth: float | None) -> dict[str, Any]:
    """Times one implementation; prints its row."""
    times = spread(replay_us(calls))
    row: dict[str, Any] = {"work": work.name, "implementation": name, **{f"{k}_us": v for k, v in times.items()}}
    if bandwidth is None:
        row["tflops"] = work.flops / times["median"] / 1e6
        figure = f"{row['tflops']:8.0f} TFLOP/s"
    else:
        row["tbps"] = work.layer_bytes / times["median"] / 1e6
        row["fraction"] = row["tbps"] * 1e12 / bandwidth
        figure = f"{row['tbps']:8.2f} TB/s {row['fraction']:6.0%}"
    print(f"  {work.name:28}{name:24}{''.join(f'{t:10.2f}' for t in times.values())}{figure}", flush=True)
    return row


def run_model(model: str, bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for work in (*decodes(model), *prefills(model)):
        batch = work.batch(make_attention("triton"))
        prefill = batch.num_decodes == 0
        rows.append(measure("triton", triton_calls(work, batch), work, None if prefill else bandwidth))
        for name, call in torch_calls(work, batch).items() if prefill else ():
            try:
                rows.append(measure(name, [call], work, None))
            except RuntimeError as e:
                print(f"  {work.name:28}{name:24}not measured: {str(e).splitlines()[0]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/attention.jsonl")
    args = parser.parse_args()

    bandwidth = memory_bandwidth("cuda")
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s\n{'microseconds':>62}{'p10':>10}{'p90':>10}")
    for model in args.models.split(","):
        print(model)
        rows = run_model(model, bandwidth)
        if not args.no_save:
            record = {"model": model, "bandwidth": bandwidth, "rows": rows}
            append_line("attention.jsonl", environment("cuda") | record)


if __name__ == "__main__":
    main()
