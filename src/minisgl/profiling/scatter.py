"""What `minisgl profile index` and `store` measure: their sizes, and what follows from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from minisgl.kernels.cpu import PackedMatrix, available
from minisgl.kernels.spec import KernelSpec, Shape
from minisgl.kernels.store.cases import ORDERS
from minisgl.profiling.record import Record
from minisgl.profiling.roofline import crossover_size
from minisgl.profiling.sweep import Variant, library, measure, versions

TOKENS = (1, 64, 256, 1024, 4096, 16384)
VOCAB, SLOTS = {"cuda": 151_936, "cpu": 16_384}, {"cuda": 262_144, "cpu": 32_768}


class Job(NamedTuple):
    """One shape to measure, with every configuration of the versions that have any, and every step of the ladder."""

    shape: Shape
    dtype: torch.dtype = torch.float16
    configs: bool = False
    ladder: bool = True


def index_jobs(device: str, quick: bool) -> list[Job]:
    """Batches, row widths, dtypes, repeated ids; one width with all configurations."""
    if quick:
        return [Job({"tokens": n, "width": 1024, "vocab": VOCAB[device]}, torch.bfloat16) for n in (1, 64, 1024)]
    jobs: list[Job] = []
    widest = 4096 if device == "cuda" else 1024
    for n in TOKENS if device == "cuda" else TOKENS[:-2]:
        shape = {"tokens": n, "width": widest, "vocab": VOCAB[device]}
        jobs += [Job(shape, configs=True), Job(shape, torch.bfloat16, ladder=False), Job({**shape, "width": 512})]
        if n >= 1024:
            jobs.append(Job({**shape, "distinct": 64}))
    return jobs


def store_jobs(device: str, quick: bool) -> list[Job]:
    """Tokens, KV widths, and orders of slots; one width with all configurations, at random slots."""
    tokens = (1, 256, 1024) if quick else TOKENS if device == "cuda" else TOKENS[:-2]
    jobs: list[Job] = []
    for n in tokens:
        for kv_heads in (8,) if quick or device == "cpu" else (8, 2):
            for order, name in enumerate(ORDERS):
                shape = {"tokens": n, "heads": kv_heads, "head_dim": 128, "slots": SLOTS[device], "order": order}
                main = kv_heads == 8 and name == "random"
                if kv_heads == 8 or name in ("random", "sequential"):
                    jobs.append(Job(shape, configs=main and not quick, ladder=main or name == "sequential"))
    return jobs


def sweep(
    spec: KernelSpec,
    jobs: Sequence[Job],
    record: Record,
    extra: Callable[..., list[Variant]],
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Rows of every job: a copy, torch's operator, `extra(shape, dtype)`, and each version that runs here."""
    rows: list[dict[str, Any]] = []
    for shape, dtype, configs, ladder in jobs:
        ours = versions(spec, shape, dtype, record, configs, most=None if ladder else 2)
        variants = [library(spec), *extra(shape, dtype), *ours]
        samples = 5 if record.quick else 9
        rows += measure(spec, shape, dtype, variants, record.ceilings, samples, failed=record.skip)
        advance()
    return rows


def packed_rows(shape: Shape, dtype: torch.dtype) -> list[Variant]:
    """The CPU's way to embed: rows of a packed weight, widened to float32, without a GPU and with the extension."""
    if torch.cuda.is_available() or not available():
        return []
    matrix = PackedMatrix(shape["vocab"], shape["width"])
    matrix[:].copy_(torch.randn(shape["vocab"], shape["width"]).to(dtype))
    return [Variant("cpu packed", lambda out, table, ids, *_: matrix.embed(ids))]


def launch_ends(rows: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """By row width in bytes and dtype, the batch from which on the launch doesn't bind any more."""
    limits: dict[str, dict[int, Any]] = {}
    for row in rows:
        shape = row["case"]
        width = "x".join(str(v) for k, v in shape.items() if k in ("width", "heads", "head_dim"))
        limits.setdefault(f"{width} {row['dtype']}", {})[shape["tokens"]] = row["limit"]
    return {name: crossover_size(sizes) for name, sizes in limits.items()}


def scatter_cost(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each version and size, by how many percent each order of slots is slower than sequential ones."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["config"] is None and row["version"] != "copy":
            case = row["case"]
            key = (row["version"], case["tokens"], case["heads"] * case["head_dim"], row["dtype"])
            times.setdefault(key, {})[ORDERS[case["order"]]] = row["us"]["median"]
    found = []
    for (version, tokens, width, dtype), us in times.items():
        if "sequential" in us:
            percent = {order: 100 * (t / us["sequential"] - 1) for order, t in us.items() if order != "sequential"}
            found.append({"version": version, "tokens": tokens, "width": width, "dtype": dtype, "percent": percent})
    return found
