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
from common import append_line, environment, memory_bandwidth, spread

from minisgl.kernels import nvrtc
from minisgl.kernels.nvrtc import Build
from minisgl.kernels.spec import KernelSpec, Shape, registry
from minisgl.kernels.tuning import Config, choose
from minisgl.profiling.replay import cold_copies, replay_us, rotated_inputs

MEGABYTE = 1 << 20


def empty_us(pdl: bool) -> float:
    """Microseconds of an empty kernel in a graph."""
    source = str(Path(__file__).with_name("empty.cu").resolve())
    run = nvrtc.prepare(Build.of(source, "empty"), 0, 1, 32, pdl)
    return spread(replay_us([run] * 1000))["median"]


def l2_bandwidth(launch_us: float) -> float:
    """Bytes per second, read and written, of a copy that stays in the L2 cache."""
    source = torch.empty(8 * MEGABYTE, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (spread(replay_us([lambda: target.copy_(source)] * 200))["median"] - launch_us) * 1e6


def measure_ceilings() -> dict[str, float]:
    p = torch.cuda.get_device_properties(0)
    launch = empty_us(pdl=False)
    ceilings = {
        "launch_us": launch,
        "launch_pdl_us": empty_us(pdl=True),
        "hbm_gbps": memory_bandwidth("cuda") / 1e9,
        "l2_gbps": l2_bandwidth(launch) / 1e9,
        # datasheet: 128 fused multiply-adds a clock and multiprocessor
        "fp32_tflops": p.multi_processor_count * 128 * 2 * getattr(p, "clock_rate", 1_700_000) * 1e3 / 1e12,
    }
    print("ceilings: " + ", ".join(f"{name} {value:.2f}" for name, value in ceilings.items()))
    return ceilings


def variants(spec: KernelSpec, which: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and keyword arguments of what to run: the preferred version, or all, with and without dependent launch."""
    if which == "best":
        return [(spec.versions[0].name, {})]
    runs: list[tuple[str, dict[str, Any]]] = []
    for version in spec.versions:
        runs.append((version.name, {"version": version.name}))
    return [*runs, (f"{spec.versions[0].name} no pdl", {"pdl": False})]


def bounds(num_bytes: int, flops: int, ceilings: dict[str, float], warm: bool) -> dict[str, float]:
    """Microseconds that each limit of the hardware asks for."""
    memory = ("L2", "l2_gbps") if warm else ("HBM", "hbm_gbps")
    return {
        "launch": ceilings["launch_pdl_us"],
        memory[0]: num_bytes / ceilings[memory[1]] / 1e3,
        "compute": flops / ceilings["fp32_tflops"] / 1e6,
    }


def plain_copies(num_bytes: int, copies: int) -> list[Callable[[], object]]:
    """The practical floor: a pointwise kernel of torch reads and writes as many bytes, contiguous."""
    size = (copies, max(num_bytes // 16, 1) * 4)
    source, target = (
        torch.ones(size, dtype=torch.bfloat16, device="cuda"),
        torch.empty(size, dtype=torch.bfloat16, device="cuda"),
    )
    return [lambda i=i: torch.neg(source[i], out=target[i]) for i in range(copies)]


def bench_shape(
    spec: KernelSpec, shape: Shape, dtype: torch.dtype, which: str, ceilings: dict[str, float], copies: int
) -> list[dict[str, Any]]:
    """A row for torch and each variant, over `copies` sets of arguments in rotation."""
    inputs = rotated_inputs(spec, shape, dtype, copies)
    num_bytes, flops = spec.cost(shape, dtype)
    warm = copies * num_bytes < torch.cuda.get_device_properties(0).L2_cache_size
    limits = bounds(num_bytes, flops, ceilings, warm)
    limit = max(limits, key=limits.__getitem__)
    rows = []
    for name, options in [("copy", {}), ("torch", {}), *variants(spec, which)]:
        function: Callable[..., Any] = spec.library if name == "torch" else spec.run
        if not options.pop("pdl", True):
            tuned = choose(spec.name, 0, num_bytes)
            options["config"] = Config(tuned.threads, tuned.work, pdl=False)
        calls = [lambda a=a, f=function, o=options: f(*a, **o) for a in inputs]
        us = spread(replay_us(plain_copies(num_bytes, copies) if name == "copy" else calls))
        rows.append(
            {
                "kernel": spec.name,
                "version": name,
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "copies": copies,
                "us": us,
                "gbps": num_bytes / us["median"] / 1e3,
                "limit": limit,
                "fraction": limits[limit] / us["median"],
            }
        )
    return rows


def show(row: dict[str, Any]) -> None:
    us, size = row["us"], next(iter(row["shape"].values()))
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
    source = str(Path(__file__).with_name("empty.cu").resolve())
    out["prepared, no arguments"] = host_us(nvrtc.prepare(Build.of(source, "empty"), 0, 1, 32, True))
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
    names = args.kernels.split(",") if args.kernels else list(registry())
    if args.first_run:
        print(first_run(names, dtype))
        return
    specs = [registry()[name] for name in names]
    record: dict[str, Any] = {"benchmark": "kernels", **environment("cuda"), "ceilings": measure_ceilings()}
    if not args.no_host:
        record |= {"host_us": bench_host(specs, dtype), "compile_s": bench_compile(names, args.dtype)}
    record["rows"] = []
    for spec in specs:
        for shape in spec.bench:
            if args.tokens and str(next(iter(shape.values()))) not in args.tokens.split(","):
                continue
            for copies in dict.fromkeys((cold_copies(spec, shape, dtype), 8)):
                for row in bench_shape(spec, shape, dtype, args.versions, record["ceilings"], copies):
                    show(row)
                    record["rows"].append(row)
    if not args.no_save:
        append_line("kernels.jsonl", record)


if __name__ == "__main__":
    main()
