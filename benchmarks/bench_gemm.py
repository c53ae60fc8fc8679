"""The matrix products of a decode step: cuBLAS beside every variant of skinny_gemm, for known models and batches.

    python benchmarks/bench_gemm.py [--models qwen3-0.6b,qwen3-8b] [--batches 1,8] [--no-ladder] [--chain]

Microseconds a call from the replay of a CUDA graph over weights in rotation that exceed the L2 cache three times, as in
a model; x and out are warm. `engine` is what the engine launches for the same work without skinny_gemm: the norm's
kernel where one lies before, cuBLAS, SiLU·mul behind gate/up. `cublas` is the product alone. The fraction is that of
the weights' bytes over the measured copy bandwidth. Batches come in the order given, of each the models in theirs, so
that a run that `--seconds` cuts short has what matters most; what it left out is in the record. Of that,
`minisgl profile tune --measured` makes entries of a tuning table.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import append_line, environment, memory_bandwidth

from minisgl.profiling.chain import bench_chain
from minisgl.profiling.products import BATCHES, MODELS, bench_product, products


def show(where: str, rows: list[dict[str, Any]]) -> None:
    times = {row["variant"]: row["us"]["median"] for row in rows}
    best = rows[0]
    ours = next((row for row in rows if row["variant"].startswith("v")), best)
    print(
        f"{where:36} cublas {times['cublas']:8.2f} µs  engine {times['engine']:8.2f}  "
        f"ours {ours['us']['median']:8.2f} {ours['fraction']:5.0%} ({ours['variant']})"
        f"{'' if best is ours else '  best: ' + best['variant']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--products", default="gate_up,down,qkv,o,head")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so many (default: 600)")
    parser.add_argument("--no-ladder", action="store_true", help="only what the engine may run: enough for the table")
    parser.add_argument("--chain", action="store_true", help="whole layers, one configuration changed at a time")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/gemm.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gemm.py measures CUDA kernels: torch sees no NVIDIA GPU")
    bandwidth, began = memory_bandwidth("cuda"), time.perf_counter()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    record: dict[str, Any] = {"benchmark": "gemm", **environment("cuda"), "bandwidth": bandwidth, "rows": []}
    left_out = []
    for batch in map(int, args.batches.split(",")):
        for model in args.models.split(","):
            if args.chain:
                times = dict(bench_chain(model, batch))
                record["rows"].append({"model": model, "tokens": batch, "us_per_layer": times})
                print(f"{model} batch {batch}, µs a layer:", *(f"\n{us:9.2f} {name}" for name, us in times.items()))
                continue
            for name, shape in products(model, batch):
                if name not in args.products.split(","):
                    continue
                where = f"{model} {name} {shape['n']}x{shape['k']} batch {batch}"
                if time.perf_counter() - began > args.seconds:
                    left_out.append(where)
                    continue
                rows = bench_product(shape, bandwidth, ladder=not args.no_ladder)
                show(where, rows)
                record["rows"].append({"model": model, "product": name, **shape, "variants": rows})
                torch.cuda.empty_cache()
    print(f"{len(left_out)} products left out")
    if not args.no_save:
        append_line("gemm-chain.jsonl" if args.chain else "gemm.jsonl", record | {"left_out": left_out})


if __name__ == "__main__":
    main()
