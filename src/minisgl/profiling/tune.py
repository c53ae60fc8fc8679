"""Measures every launch configuration of every kernel on the GPU at hand, and writes the table of the best."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from minisgl.hardware import detect
from minisgl.kernels.nvrtc import arch_of
from minisgl.kernels.spec import KernelSpec, Shape, registry
from minisgl.kernels.tuning import Config, bucket, table_paths
from minisgl.profiling.ceilings import memory_bandwidth
from minisgl.profiling.products import BATCHES, bench_product, entries, products, row_name
from minisgl.profiling.replay import cold_copies, replay_us, rotated_inputs
from minisgl.types import KernelError

DTYPE = torch.bfloat16
WARM_COPIES = 8  # sets of arguments in rotation that small calls find in the L2 cache


def best_config(timed: Iterable[tuple[Config, float]], margin: float = 0.01) -> Config:
    """The fastest; among those within `margin` of it, the same for all we know, the first with the largest blocks.

    Shapes that the table isn't measured for, narrow rows above all, need more blocks: small ones are then too many.
    """
    measured = list(timed)
    limit = min(time for _, time in measured) * (1 + margin)
    return max((config for config, time in measured if time <= limit), key=lambda config: config.threads)


def measure(spec: KernelSpec, shape: Shape) -> list[tuple[Config, float]]:
    """Microseconds a call under each configuration, the mean of cold data and of data in the L2 cache.

    An engine has both: activations that the kernel before has just written, tables and caches that nobody touched.
    """
    sums = dict.fromkeys(spec.configs, 0.0)
    for copies in (cold_copies(spec, shape, DTYPE, most=1024), WARM_COPIES):
        inputs = rotated_inputs(spec, shape, DTYPE, copies)
        for config in spec.configs:
            calls = [lambda args=args, c=config: spec.run(*args, config=c) for args in inputs]
            sums[config] += statistics.median(replay_us(calls, samples=7)) / 2
    return list(sums.items())


def tune(models: Iterable[str], report: Callable[[str], None] = print) -> dict[str, Any]:
    """The table for this GPU: by kernel and bucket of bytes moved, threads a block and work a thread.

    Of `models` (names in `shapes.SHAPES`) the matrix products are measured beside cuBLAS. What is known already of the
    products of others stays in the table.

    Raises:
        KernelError: there is no CUDA GPU.
    """
    hardware = detect()
    if hardware.cuda is None:
        raise KernelError(f"tuning needs an NVIDIA GPU: {hardware.no_cuda_reason}")
    kernels: dict[str, dict[str, list[int]]] = {}
    for spec in registry().values():
        for shape in spec.tunable:
            timed = measure(spec, shape)
            best, worst = best_config(timed), max(time for _, time in timed)
            rows = kernels.setdefault(spec.name, {})
            rows[str(bucket(spec.cost(shape, DTYPE)[0]))] = [best.threads, best.work]
            report(
                f"{spec.name:12} tokens {shape['tokens']:6}: {best.threads:4} threads, {best.work} a thread, "
                f"{dict(timed)[best]:8.2f} µs (worst {worst:.2f})"
            )
    arch = arch_of(hardware.cuda.capability)
    table = {"arch": arch, "gpu": hardware.cuda.name, "torch": torch.__version__, "kernels": kernels}
    known: dict[str, dict[str, list[int]]] = next(
        (json.loads(path.read_text())["kernels"] for path in table_paths(arch) if path.is_file()), {}
    )
    kernels.update({name: rows for name, rows in known.items() if name not in kernels})
    return with_products(table, _measured_products(models, report))


def _measured_products(models: Iterable[str], report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    bandwidth = memory_bandwidth("cuda")
    for model in models:
        for batch in BATCHES:
            for name, shape in products(model, batch):
                variants = bench_product(shape, bandwidth)
                report(f"{model} {name} batch {batch}: {variants[0]['variant']}, {variants[0]['us']['median']:.2f} µs")
                yield {**shape, "variants": variants}


def with_products(table: dict[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`table` with the matrix products of `rows` instead of what it has of them, batch by batch."""
    rows = list(rows)
    kernels = {name: dict(buckets) for name, buckets in table["kernels"].items()}
    for row in rows:
        kernels.get(row_name(row), {}).pop(str(row["tokens"]), None)
    for name, buckets in entries(rows).items():
        kernels[name] = dict(sorted({**kernels.get(name, {}), **buckets}.items(), key=lambda item: int(item[0])))
    return table | {"kernels": {name: buckets for name, buckets in kernels.items() if buckets}}


def write_table(table: dict[str, Any], path: Path | None = None) -> Path:
    """Writes `table` to `path`, or else where this user's tables are looked for first."""
    path = path or table_paths(table["arch"])[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f'    "{name}": {json.dumps(row)}' for name, row in table["kernels"].items())
    head = "".join(f'  "{key}": {json.dumps(table[key])},\n' for key in ("arch", "gpu", "torch"))
    path.write_text(f'{{\n{head}  "kernels": {{\n{rows}\n  }}\n}}\n')
    return path
