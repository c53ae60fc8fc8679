"""Triton attention on a GPU: decode against memory bandwidth, prefill beside torch's own flash attention and cuDNN.

    python benchmarks/bench_attention.py [--models qwen3-0.6b] [--fp8] [--flashinfer] [--no-save]

Times are per call from the replay of a CUDA graph over the layers of a pool of 256 MB and more, so that no call finds
its keys and values in the L2 cache. What torch is given lies contiguous already: its flash attention reads no pages of
16 tokens. FlashInfer runs as in a captured step, planned for these lengths; the plan's time on the host stands beside.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import append_line, environment, memory_bandwidth, spread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minisgl.attention import make_attention, triton_paged
from minisgl.attention.base import ForwardBatch
from minisgl.attention.triton_decode import rank
from minisgl.cli.bench_offline import draw
from minisgl.cli.bench_options import Range
from minisgl.profiling.attention import MODELS, Workload, decodes, layer_calls, prefills
from minisgl.profiling.replay import replay_us

DECODES = ((1, 672), (8, 672), (32, 672), (128, 672), (256, 672), (1, 4096))  # batch, context
PREFILLS = ((32, 512, 0), (8, 2048, 0), (4, 4000, 0), (1, 2048, 2048), (8, 256, 2048))  # sequences, tokens, cached


def workloads(model: str) -> Iterator[Workload]:
    """Batches at the context of the engine's benchmark, long ones, and ragged ones of the same mean; prefills."""
    yield from decodes(model, DECODES)
    ragged = tuple(np.random.default_rng(0).integers(100, 1245, 256).tolist())
    yield Workload("decode 256 x 100..1244", *MODELS[model], ragged, (1,) * 256)
    for batch in (32, 256):
        ragged = tuple(np.random.default_rng(0).integers(100, 2001, batch).tolist())
        yield Workload(f"decode {batch} x 100..2000", *MODELS[model], ragged, (1,) * batch)
    yield from prefills(model, PREFILLS)


def moments(model: str) -> Iterator[Workload]:
    """Batches of one length, and those that offline256 (see bench_gpu.py) has after so many steps."""
    yield from decodes(model, [(batch, 672) for batch in (256, 128, 64, 32, 8, 1)])
    drawn = draw(256, Range(100, 1024), Range(100, 1024), 0, 151_936)
    for step in (10, 300, 500, 700, 850, 950):
        lens = tuple(
            len(prompt) + step for prompt, length in zip(drawn.prompts, drawn.outputs, strict=True) if length > step
        )
        yield Workload(f"offline256, step {step}", *MODELS[model], lens, (1,) * len(lens))


def run_orders(model: str, bandwidth: float, fp8: bool) -> list[dict[str, Any]]:
    rows = []
    for work in moments(model):
        work = replace(work, fp8=fp8)
        batch = work.batch(make_attention("triton"))
        for name, order in (("as they come", lambda lens: None), ("longest first", rank)):
            with mock.patch.object(triton_paged, "rank", order):
                batch.attention.prepare(batch)
            rows.append(measure(name, layer_calls(work, batch), work, bandwidth))
    return rows


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


def flashinfer_row(work: Workload, bandwidth: float) -> dict[str, Any]:
    """The same work through FlashInfer; decodes in a captured step, planned as before a replay."""
    batch = work.batch(make_attention("flashinfer"))
    decoding, size, starts = batch.num_decodes > 0, batch.num_decodes, [n - 1 for n in work.lens]
    if decoding:
        batch.table_rows = torch.arange(size, dtype=torch.int32, device="cuda")
    calls = layer_calls(work, batch)
    calls[0]()
    plan_us = []
    for _ in range(20 if decoding else 0):
        torch.cuda.synchronize()
        began = time.perf_counter()
        batch.attention.before_replay(size, batch.page_table.shape[1], starts)
        plan_us.append((time.perf_counter() - began) * 1e6)
    row = measure("flashinfer", calls, work, bandwidth if decoding else None)
    if decoding:
        row["plan_us"] = float(np.median(plan_us))
        print(f"  {'':28}{'plan, on the host':24}{row['plan_us']:10.2f}")
    return row


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


def run_model(model: str, bandwidth: float, fp8: bool, flashinfer: bool) -> list[dict[str, Any]]:
    rows = []
    for work in workloads(model):
        if fp8:
            work = replace(work, fp8=True, name=f"{work.name}, fp8")
        batch = work.batch(make_attention("triton"))
        prefill = batch.num_decodes == 0
        rows.append(measure("triton", layer_calls(work, batch), work, None if prefill else bandwidth))
        if flashinfer:
            rows.append(flashinfer_row(work, bandwidth))
        for name, call in torch_calls(work, batch).items() if prefill and not fp8 else ():
            try:
                rows.append(measure(name, [call], work, None))
            except RuntimeError as e:
                print(f"  {work.name:28}{name:24}not measured: {str(e).splitlines()[0]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--fp8", action="store_true", help="over an FP8 cache; ours alone")
    parser.add_argument("--flashinfer", action="store_true", help="FlashInfer beside ours, if it is installed")
    parser.add_argument(
        "--orders", action="store_true", help="decode alone: the longest sequences first, or as they come"
    )
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/attention.jsonl")
    args = parser.parse_args()

    bandwidth = memory_bandwidth("cuda")
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s\n{'microseconds':>62}{'p10':>10}{'p90':>10}")
    for model in args.models.split(","):
        print(model)
        if args.orders:
            rows = run_orders(model, bandwidth, args.fp8)
        else:
            rows = run_model(model, bandwidth, args.fp8, args.flashinfer)
        if not args.no_save:
            record = {"model": model, "fp8": args.fp8, "bandwidth": bandwidth, "rows": rows}
            append_line("attention.jsonl", environment("cuda") | record)


if __name__ == "__main__":
    main()
