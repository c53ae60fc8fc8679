"""Every kernel of the registry beside torch's own operator: microseconds, GB/s, the limit that binds, how near it is.

    python benchmarks/bench_kernels.py [--kernels index,store] [--versions all] [--dtype bfloat16] [--no-save]

Times are per call from the replay of a CUDA graph over sets of arguments in rotation, twice: over so many that they
exceed the L2 cache three times (cold), and over eight (x8), which small calls find in the L2 cache as they do in an
engine, where the kernel before has just written them. The ceilings come first, measured in the same run: an empty
kernel (launch latency, with and without programmatic dependent launch), a large copy (HBM), a copy within the L2 cache.
The row 'copy' is a plain pointwise kernel over as many bytes: what the GPU does at that size without any indirection.
A row's limit is the largest of launch latency, bytes / bandwidth and operations / peak rate; the fraction is that over
the time measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import append_line, environment, spread

from minisgl.kernels import nvrtc
from minisgl.kernels.spec import KernelSpec, Shape, registry
from minisgl.profiling.ceilings import EMPTY, gpu_ceilings
from minisgl.profiling.record import Record, new_record
from minisgl.profiling.replay import cold_copies, rotated_inputs
from minisgl.profiling.sweep import WARM_COPIES, Variant, library, measure, versions


def variants(spec: KernelSpec, shape: Shape, dtype: torch.dtype, which: str, record: Record) -> list[Variant]:
    """torch's operator, then the preferred version, or all, with and without dependent launch."""
    ours = versions(spec, shape, dtype, record, configs=False)
    return [library(spec), *(ours[:1] if which == "best" else ours)]


def show(row: dict[str, Any]) -> None:
    us, size = row["us"], next(iter(row["case"].values()))
    print(
        f"{row['kernel']:12} {size:6} {row['version']:10} x{row['copies']:<5} {us['median']:9.2f} µs "
        f"({us['p10']:.2f}-{us['p90']:.2f}) {row['gbps']:7.0f} GB/s  {row['fraction']:4.0%} of {row['limit']}"
    )


def host_us(call: Callable[[], object], calls: int = 200) -> dict[str, float]:
    """Host time a call, which the GPU must outpace: batches of `calls`, the queue empty before each."""
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) / calls * 1e6)
    return spread(times[5:])


def bench_host(specs: list[KernelSpec], dtype: torch.dtype) -> dict[str, Any]:
    """Host microseconds a launch: prepared, by the public function with its checks, by Triton, by torch."""
    out: dict[str, Any] = {}
    out["prepared, no arguments"] = host_us(nvrtc.prepare(EMPTY, 0, 1, 32, True))
    for spec in specs:
        args = rotated_inputs(spec, spec.bench[0], dtype, 1)[0]
        for version in spec.versions:
            out[f"{spec.name} {version.name}"] = host_us(lambda a=args, s=spec, v=version.name: s.run(*a, version=v))
        out[f"{spec.name} torch"] = host_us(lambda a=args, s=spec: s.library(*a))
    for name, us in out.items():
        print(f"host {name:28} {us['median']:6.2f} µs ({us['p10']:.2f}-{us['p90']:.2f})")
    return out


def first_run(names: list[str], dtype: torch.dtype) -> float:
    """Seconds until every kernel has run at every benchmark size, in this process, from importing the compiler on."""
    specs = [registry()[name] for name in names]
    inputs = [(s, rotated_inputs(s, {**shape, "vocab": 1024}, dtype, 1)[0]) for s in specs for shape in s.bench]
    torch.cuda.synchronize()
    began = time.perf_counter()
    for spec, args in inputs:
        spec.run(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def bench_compile(names: list[str], dtype: str) -> dict[str, float]:
    """`first_run` of a fresh process with an empty cache of compiled kernels, then of one that finds them there."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--first-run", "--kernels", ",".join(names), "--dtype", dtype]
        for name in ("first compile", "from cache"):
            done = subprocess.run(
                command, env={**os.environ, "MINISGL_CACHE": folder}, check=True, capture_output=True, text=True
            )
            seconds[name] = float(done.stdout)
        cubins = len(list(Path(folder).rglob("*.cubin")))
    print(f"compile: {cubins} cubins, " + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", help="names, with commas between (default: all)")
    parser.add_argument("--versions", choices=("best", "all"), default="all")
    parser.add_argument("--tokens", help="rows, with commas between (default: the kernel's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--no-host", action="store_true", help="leave out host and compile times")
    parser.add_argument("--first-run", action="store_true", help="only print the seconds until every kernel has run")
    parser.add_argument("--no-save", action="store_true", help="don't append to results/kernels.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py measures CUDA kernels: torch sees no NVIDIA GPU")
    dtype = getattr(torch, args.dtype)
    names = args.kernels.split(",") if args.kernels else [s.name for s in registry().values() if s.on_gpu and s.bench]
    if args.first_run:
        print(first_run(names, dtype))
        return
    specs = [registry()[name] for name in names]
    ceilings = gpu_ceilings()
    print("ceilings: " + ", ".join(f"{name} {value:.2f}" for name, value in ceilings.items()))
    record: dict[str, Any] = {"benchmark": "kernels", **environment("cuda"), "ceilings": ceilings}
    if not args.no_host:
        record |= {
            "host_us": bench_host(specs, dtype),
            "compile_s": bench_compile([s.name for s in specs if s.kind == "cuda"], args.dtype),
        }
    record["rows"] = []
    for spec in specs:
        for shape in spec.bench:
            if args.tokens and str(next(iter(shape.values()))) not in args.tokens.split(","):
                continue
            runs = variants(spec, shape, dtype, args.versions, new_record("kernels", quick=False))
            for warm in (False, True) if cold_copies(spec, shape, dtype) != WARM_COPIES else (False,):
                for row in measure(spec, shape, dtype, runs, ceilings, samples=15, warm=warm):
                    show(row)
                    record["rows"].append(row)
    if not args.no_save:
        append_line("kernels.jsonl", record)


if __name__ == "__main__":
    main()
