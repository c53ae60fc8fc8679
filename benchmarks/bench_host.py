"""What a decode step costs the host, without a device: everything but the kernels, which do nothing here.

    python benchmarks/bench_host.py [--batches 1 32 256] [--steps 300] [--cold] [--profile] [--no-save]

A model of one narrow layer computes the prompts; from then on every step is the engine's own code around CUDA graphs
that are empty. On a GPU a step costs a graph launch or two and two small copies more. Microseconds a step by part:

    schedule  which requests, which pages       launch  the graph's input words, and their copy
    collect   tokens to the requests            text    detokenizing, stop strings, deltas (OutputProcessor)

Steps follow one another here with everything in the caches, where a GPU's come milliseconds apart; with --cold the
core's caches are swept before each, which is nearer to what a GPU's host shows.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append_line, environment, spread

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.engine.graphs import Captured, DecodeGraphs, DecodeStep, batch_sizes
from minisgl.models.hub import resolve_model
from minisgl.profiling.settled import only_decodes
from minisgl.text import OutputProcessor, load_text
from minisgl.types import SamplingParams

SHAPE = {
    "model_type": "qwen3", "vocab_size": 49_152, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 40_960,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT = 24  # tokens
SWEPT = 64 << 20  # bytes: more than the caches of a core
PARTS = ("schedule", "launch", "collect", "text")


class Nothing:
    """A CUDA graph of no kernels."""

    def replay(self) -> None:
        pass


class EmptyGraphs(DecodeGraphs):
    """Decode steps that compute nothing: every token is the same."""

    def _capture(self, step: DecodeStep, memory: Any) -> tuple[Captured, Any]:
        graph: Any = Nothing()
        self.mail._tokens.fill_(100)
        return Captured(step, graph, graph, torch.empty(step.size, 0)), None


def make_engine(batch: int) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPE))
        engine = Engine(
            EngineConfig(
                model=folder, dummy_weights=True, device="cpu", attention="torch_sdpa", max_running=batch,
                max_batched_tokens=max(2048, batch), num_pages=batch * 64,
            )
        )  # fmt: skip
    runner = engine.runner
    runner.graphs = EmptyGraphs(runner.model, runner.pool, runner.attention, runner.rows, batch_sizes(batch), False)
    return engine


def start(engine: Engine, batch: int, steps: int) -> OutputProcessor | None:
    """Fills the engine with requests that decode; what turns their tokens into text, if the tokenizer is there."""
    try:
        output = OutputProcessor(load_text(resolve_model("smollm2")).tokenizer)
    except Exception as e:  # the model isn't there and can't be fetched: the rest can be measured still
        print(f"no text: {e}")
        output = None
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=steps + 40).resolve({}, [])
    for i in range(batch):
        prompt = array("i", [(7 * i + k) % 40_000 for k in range(PROMPT)])
        engine.add(str(i), prompt, params)
        if output is not None:
            output.add(str(i), prompt, params)
    while not only_decodes(engine.scheduler):
        engine.step()
    return output


def measure(engine: Engine, output: OutputProcessor | None, steps: int, cold: bool) -> dict[str, list[float]]:
    """Microseconds of each part, a value a step."""
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    clock = time.perf_counter
    handles = []
    swept = np.zeros(SWEPT if cold else 0, np.uint8)
    for _ in range(steps):
        swept += 1
        marks = [clock()]
        batch = engine.scheduler.schedule()
        marks.append(clock())
        handles.append(engine.runner.launch(batch))
        marks.append(clock())
        outputs = engine._collect(handles.pop(0)) if len(handles) > 1 else []
        marks.append(clock())
        if output is not None:
            output.process(outputs)
        marks.append(clock())
        for part, began, ended in zip(PARTS, marks, marks[1:], strict=False):
            times[part].append((ended - began) * 1e6)
    engine._collect(handles.pop())
    return times


def bench(batch: int, steps: int, profile: bool, cold: bool) -> dict[str, Any]:
    engine = make_engine(batch)
    output = start(engine, batch, steps)
    while engine._in_flight:
        engine._collect(engine._in_flight.popleft())
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    times = measure(engine, output, steps, cold)
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    times["engine"] = [sum(values) for values in zip(*(times[p] for p in PARTS[:3]), strict=True)]
    row = {"batch": batch, "cold": cold} | {
        part: {k: round(v, 1) for k, v in spread(x).items()} for part, x in times.items()
    }
    print(f"batch {batch:4}: " + "  ".join(f"{part} {row[part]['median']:7.1f}" for part in (*PARTS, "engine")) + " µs")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=300, help="decode steps timed (default: 300)")
    parser.add_argument("--cold", action="store_true", help="sweep the caches before every step")
    parser.add_argument("--profile", action="store_true", help="print what cProfile sees; times are longer then")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/host.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [bench(batch, args.steps, args.profile, args.cold) for batch in args.batches]
    if not args.no_save:
        append_line("host.jsonl", environment("cpu") | {"bench": "host", "goal_us": 300, "rows": rows})


if __name__ == "__main__":
    main()
