"""The collectives of one decode step of a model that is split over ranks: when each begins, and how long it takes."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.config import EngineConfig
from minisgl.distributed import TPGroup
from minisgl.profiling.ranks import run_ranks
from minisgl.profiling.record import Record, new_record
from minisgl.profiling.shapes import SHAPES
from minisgl.types import SamplingParams

# SmolLM2 has 9 heads, which can't be dealt out to two ranks.
_EIGHT_HEADS = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
WARM_UP = 3  # decode steps before any is measured
Call = tuple[str, int, int, int]  # name, start and end in nanoseconds, bytes


@dataclass
class Listener:
    """A group's backend that notes its collectives; on a GPU it waits for each, which slows the step down."""

    backend: Any
    calls: list[Call] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def all_reduce(self, x: Tensor) -> None:
        began = _now(x)
        self.backend.all_reduce(x)
        self.calls.append(("all_reduce", began, _now(x), x.nbytes))

    def all_gather(self, x: Tensor) -> Tensor:
        began = _now(x)
        found: Tensor = self.backend.all_gather(x)
        self.calls.append(("all_gather", began, _now(x), found.nbytes))
        return found

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        found: Tensor | None = self.backend.workspace(shape, dtype)
        return found


def _now(x: Tensor) -> int:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter_ns()


def measure(quick: bool) -> Record:
    """A record whose rows are the collectives of the median step on rank 0, in order.

    Raises:
        CommunicationError: a rank failed.
    """
    record = new_record("tp", quick)
    gpus = torch.cuda.device_count()
    device, model, shape, world = ("cuda", "qwen3-0.6b", SHAPES["qwen3-0.6b"], min(gpus, 8) & ~1)
    if gpus < 2:
        record.skip("tensor parallelism on GPUs", f"it takes two; torch sees {gpus}, so ranks run on the CPU over gloo")
        record = replace(record, hardware={**record.hardware, "device": "cpu", "name": _cpu_name(record)})
        device, model, shape, world = ("cpu", "smollm2 with 8 heads", SHAPES["smollm2"] | _EIGHT_HEADS, 2)
    elif world > 2:
        world = 1 << (world.bit_length() - 1)
    sizes = {"batch": 2, "context": 32, "steps": 5} if quick else {"batch": 8, "context": 256, "steps": 15}
    rows, step_us = run_ranks(world, device, timed_rank, device, shape, *sizes.values())[0]
    spent = sum(row["us"] for row in rows)
    facts = {"model": model, "layers": shape["num_hidden_layers"], "world": world, "device": device, **sizes}
    summary = facts | {"step_us": step_us, "comm_us": spent, "share": spent / step_us, "calls": len(rows)}
    return replace(record, rows=rows, summary=summary)


def _cpu_name(record: Record) -> str:
    return f"{record.hardware['cpu']}, {record.hardware['num_cores']} cores"


def timed_rank(
    group: TPGroup, device: str, shape: dict[str, Any], batch: int, context: int, steps: int
) -> tuple[list[dict[str, Any]], float]:
    """What one rank does: every rank adds the same requests and makes the same steps, so that all agree."""
    from minisgl.engine.engine import Engine

    listener = Listener(group.backend)
    pages = batch * (-(-(context + steps + 16) // 16) + 1)
    options: dict[str, Any] = {"device": device, "dummy_weights": True, "tp_size": group.size, "num_pages": pages}
    options |= {"max_running": batch, "prefix_cache": False, "overlap": False, "cuda_graph": False}
    with tempfile.TemporaryDirectory(prefix="minisgl-tp-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        engine = Engine(EngineConfig(model=folder, **options), TPGroup(group.rank, group.size, listener))
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=steps + WARM_UP + 8, ignore_eos=True).resolve({}, ())
    for i in range(batch):
        engine.add(f"tp-{i}", array("i", (rng.randrange(engine.vocab_size) for _ in range(context))), params)
    while any(not r.num_output for r in engine.scheduler.requests.values()):
        engine.step()
    taken = []
    for _ in range(WARM_UP + steps):
        listener.calls.clear()
        began = time.perf_counter_ns()
        engine.step()
        taken.append(((time.perf_counter_ns() - began) / 1e3, _rows(listener.calls, began)))
    measured = taken[WARM_UP:]
    middle = statistics.median_low(us for us, _ in measured)
    return next(rows for us, rows in measured if us == middle), middle


def _rows(calls: list[Call], zero: int) -> list[dict[str, Any]]:
    return [
        {"op": op, "start_us": (start - zero) / 1e3, "us": (end - start) / 1e3, "bytes": size}
        for op, start, end, size in calls
    ]
