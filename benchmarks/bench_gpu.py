"""One engine, everything that is to be known of its speed on a GPU, the most important figures first.

    python benchmarks/bench_gpu.py --shape qwen3-0.6b [--fused auto|on|off] [--parts start,offline,...] [--out FILE]

Random weights, bfloat16. Each part appends its JSON line to FILE as soon as it is done, so a run cut short has what it
measured till then; a part that fails leaves a line with its error. `--tiny` goes through the same motions with a model
of two narrow layers on a CPU, which proves nothing but this program.

    start      seconds since this process began until the first token; what memory went to
    offline    the workload offline256 of docs/bench.md, with overlap
    decode     a decode step at context 672, batch 256 to 1, beside the floor that memory bandwidth sets
    breakdown  kernels of that step, microseconds a step, and what lies between them
    prefill    32 x 512, 8 x 2048 and 4 x 4000 tokens
    host       microseconds that the host spends on a decode step, waiting apart
    launch     what of that the launch takes, piece by piece (see launch_split.py)
    sampling   decode steps with temperature, top-p and top-k, and with all of them
    mixed      steps of decodes and a chunk of prefill, and lone prompts, with CUDA graphs and without: host-bound where
               the launch takes as long as the step
    plain      offline256 without overlap
    eager      offline256 without CUDA graphs
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisgl.llm import LLM  # first, as in a user's program: it imports torch with the garbage collector off

# isort: split
import launch_split
import torch
from bench_engine import bench_decode, bench_prefill, drain, random_prompt, sync
from common import environment, memory_bandwidth, spread

from minisgl.cli.bench_offline import draw, measure
from minisgl.cli.bench_options import Range
from minisgl.engine import engine as engine_module
from minisgl.engine.engine import Engine
from minisgl.engine.runner import ModelRunner
from minisgl.profiling import shapes
from minisgl.profiling.floor import kv_bytes, step_bytes
from minisgl.profiling.settled import only_decodes
from minisgl.types import SamplingParams

PARTS = ("start", "offline", "decode", "breakdown", "prefill", "host", "launch", "sampling", "mixed", "plain", "eager")
TINY = {
    "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
START = [  # phases of an engine's start
    (engine_module, "detect", "hardware"), (engine_module, "load_model", "model"),
    (engine_module, "measure", "memory budget"), (ModelRunner, "capture", "graphs"),
]  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def process_seconds() -> float:
    """Since this process began, or $BENCH_BEGAN (seconds since 1970); what came before this file's first line too."""
    if "BENCH_BEGAN" in os.environ:
        return time.time() - float(os.environ["BENCH_BEGAN"])
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


class Bench:
    """An engine and what the parts share."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.tiny = args, args.tiny
        self.batches = (4, 2, 1) if self.tiny else (256, 128, 32, 8, 1)
        self.context, self.steps = (40, 6) if self.tiny else (672, 48)
        self.phases = {"imports": process_seconds()}
        began = time.perf_counter()
        sizes = {"max_running": max(self.batches), "max_batched_tokens": 256 if self.tiny else 16384}
        device = {"device": "cpu", "num_pages": 200} if self.tiny else {"device": "cuda"}
        fused = "off" if self.tiny else args.fused
        with launch_split.watched(START) as watch:
            self.llm = LLM(
                model=str(folder), dummy_weights=True, max_model_len=256 if self.tiny else 4096, fused_kernels=fused,
                attention=args.attention, **sizes, **device,
            )  # fmt: skip
        self.engine: Engine = self.llm.engine
        self.engine_seconds = time.perf_counter() - began
        self.phases |= {name: sum(times) / 1e6 for name, times in watch.times.items()}
        self.bandwidth = 0.0

    # -- parts -------------------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        began = time.perf_counter()
        self.llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1))
        seconds = process_seconds()
        self.phases["first request"] = time.perf_counter() - began
        self.bandwidth = memory_bandwidth(self.engine.config.device)
        graphs = self.engine.runner.graphs
        pool = self.engine.runner.pool
        row: dict[str, Any] = {
            "first_token_s": round(seconds, 2),
            "engine_s": round(self.engine_seconds, 2),
            "phases_s": {name: round(value, 3) for name, value in self.phases.items()},
            "graphs": len(graphs.sizes) * len(graphs.widths) if graphs else 0,
            "kv_tokens": pool.num_tokens,
            "bandwidth_gb_s": round(self.bandwidth / 1e9, 1),
        }
        if torch.cuda.is_available():
            row["reserved_gb"] = round(torch.cuda.memory_reserved() / 1e9, 2)
        return row

    def offline(self) -> dict[str, Any]:
        lens = Range(5, 20) if self.tiny else Range(100, 1024)
        ledger = self.engine.scheduler.ledger
        if ledger.cache is not None:  # of earlier parts' prompts
            ledger.free.extend(ledger.cache.evict(ledger.cache.num_evictable_pages).tolist())
        work = draw(6 if self.tiny else 256, lens, lens, 0, self.engine.vocab_size)
        seconds, tokens = measure(self.llm, work)
        return {"tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 3), "tokens": tokens}

    def plain(self) -> dict[str, Any]:
        self.engine.lag = 0
        try:
            return self.offline()
        finally:
            self.engine.lag = 1

    def eager(self) -> dict[str, Any]:
        graphs, self.engine.runner.graphs = self.engine.runner.graphs, None
        try:
            return self.offline()
        finally:
            self.engine.runner.graphs = graphs

    def decode(self) -> dict[str, Any]:
        per_token = kv_bytes(self.engine)
        bandwidth = self.bandwidth or memory_bandwidth(self.engine.config.device)
        rows = []
        for batch in self.batches:
            ms = {k: round(v * 1e3, 4) for k, v in spread(self._decode(batch)).items()}
            floor = (step_bytes(self.engine, batch) + batch * self.context * per_token) / bandwidth * 1e3
            rows.append(
                {"batch": batch, "ms": ms, "floor_ms": round(floor, 4), "of_floor": round(floor / ms["median"], 3)}
            )
        return {"context": self.context, "rows": rows}

    def _decode(self, batch: int) -> list[float]:
        return bench_decode(self.engine, batch, self.context, self.steps)

    def prefill(self) -> dict[str, Any]:
        cases = ((3, 20), (1, 60)) if self.tiny else ((32, 512), (8, 2048), (4, 4000))
        rows = []
        for count, length in cases:
            ms = {k: round(v * 1e3, 3) for k, v in spread(bench_prefill(self.engine, count, length, 5)).items()}
            rows.append({"prompts": count, "tokens": length, "ms": ms})
        return {"rows": rows}

    def breakdown(self) -> dict[str, Any]:
        """Kernels of decode steps at the largest batch and at 32, by name."""
        return {"rows": [self._breakdown(batch) for batch in (self.batches[0], self.batches[-3])]}

    def _breakdown(self, batch: int) -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        self._fill(batch, GREEDY)
        steps = 10
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        sync(self.engine)
        began = time.perf_counter()
        with profile(activities=activities) as recorded:
            for _ in range(steps):
                self.engine.step()
            sync(self.engine)
        wall = (time.perf_counter() - began) / steps * 1e6
        totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for event in recorded.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                totals[event.name][0] += 1
                totals[event.name][1] += event.time_range.elapsed_us()
        self._empty()
        kernels = [
            {"kernel": name[:120], "calls": round(calls / steps, 2), "us": round(us / steps, 2)}
            for name, (calls, us) in sorted(totals.items(), key=lambda item: -item[1][1])
        ]
        busy = sum(k["us"] for k in kernels)
        return {"batch": batch, "wall_us": round(wall, 1), "kernels_us": round(busy, 1), "kernels": kernels[:40]}

    def host(self) -> dict[str, Any]:
        """As `bench_host.py`, with real graphs behind it. Waiting is what `collect` spends on the step's event."""
        rows = []
        for batch in self.batches:
            self._fill(batch, replace(GREEDY, temperature=0.6))
            parts: dict[str, list[float]] = {"schedule": [], "launch": [], "wait": [], "collect": []}
            handles: list[Any] = []
            for _ in range(self.steps):
                marks = [time.perf_counter()]
                planned = self.engine.scheduler.schedule()
                marks.append(time.perf_counter())
                handles.append(self.engine.runner.launch(planned))
                marks.append(time.perf_counter())
                due = handles.pop(0) if len(handles) > 1 else None
                if due is not None and due.done is not None:
                    due.done.synchronize()
                marks.append(time.perf_counter())
                if due is not None:
                    self.engine._collect(due)
                marks.append(time.perf_counter())
                for name, a, b in zip(parts, marks, marks[1:], strict=False):
                    parts[name].append((b - a) * 1e6)
            self.engine._collect(handles.pop())
            busy = [sum(x) for x in zip(parts["schedule"], parts["launch"], parts["collect"], strict=True)]
            medians = {name: round(spread(x)["median"], 1) for name, x in (parts | {"host": busy}).items()}
            rows.append({"batch": batch, "us": medians})
            self._empty()
        return {"rows": rows}

    def launch(self) -> dict[str, Any]:
        rows = []
        for batch in (self.batches[0], self.batches[-1]):
            self._fill(batch, replace(GREEDY, temperature=0.6))
            found = {way: launch_split.pieces(self.engine, self.steps, way == "behind") for way in ("idle", "behind")}
            rows.append({"batch": batch} | found)
            self._empty()
        return {"rows": rows} | launch_split.controls(self.engine)

    def sampling(self) -> dict[str, Any]:
        """Decode steps at the largest batch under parameters that need more and more."""
        hot = replace(GREEDY, temperature=0.6)
        cases = {
            "greedy": GREEDY,
            "temperature": hot,
            "top_p": replace(hot, top_p=0.9),
            "top_k": replace(hot, top_k=50),
            "top_k, top_p, min_p": replace(hot, top_p=0.9, top_k=50, min_p=0.02),
            "presence penalty": replace(hot, presence_penalty=0.5),
        }
        rows = []
        for name, params in cases.items():
            self._fill(self.batches[0], params)
            times = []
            for _ in range(self.steps // 2):
                began = time.perf_counter()
                self.engine.step()
                times.append(time.perf_counter() - began)
            rows.append({"params": name, "ms": {k: round(v * 1e3, 4) for k, v in spread(times[2:] or times).items()}})
            self._empty()
        return {"batch": self.batches[0], "rows": rows}

    def mixed(self) -> dict[str, Any]:
        """Steps that compute decodes and a chunk of a prompt, launched one at a time; without decodes: a lone prompt's.

        `launch_ms` is how long the host takes to launch one, `step_ms` how long until its tokens are there: where the
        two are close, the GPU waits for the host. `first_ms` is the first step of its kind, which captures nothing
        yet, `second_ms` the one that captures its graph.
        """
        lone = (8, 30) if self.tiny else (32, 256, 1024, 2048)
        some = ((2, 8), (2, 30)) if self.tiny else ((32, 64), (32, 256), (32, 1024), (128, 256), (192, 2048))
        rows = []
        for decodes, chunk in [(0, tokens) for tokens in lone] + list(some):
            self._fill(decodes, GREEDY)
            for graphs in ("on", "off"):
                kept = self.engine.runner.graphs
                if graphs == "off":
                    self.engine.runner.graphs = None
                rows.append({"decodes": decodes, "prefill": chunk, "graphs": graphs} | self._mixed(chunk))
                self.engine.runner.graphs = kept
                print(json.dumps(rows[-1]), flush=True)
            self._empty()
        prompts = self.engine.runner.prompt_graphs
        captured = sum(step.graph is not None for step in prompts.steps.values()) if prompts else 0
        return {"rows": rows, "captured": captured}

    def _mixed(self, chunk: int) -> dict[str, float]:
        launch, step = [], []
        for i in range(8):
            self.engine.add(f"mixed{i}", random_prompt(chunk, self.engine.vocab_size), GREEDY.resolve({}, []))
            sync(self.engine)
            began = time.perf_counter()
            handle = self.engine.runner.launch(self.engine.scheduler.schedule())
            launched = time.perf_counter()
            self.engine._collect(handle)
            ended = time.perf_counter()
            launch.append(launched - began)
            step.append(ended - began)
            self.engine.abort(f"mixed{i}")
        ms = [round(spread(x)["median"] * 1e3, 3) for x in (launch[3:], step[3:], step[:1], step[1:2])]
        return dict(zip(("launch_ms", "step_ms", "first_ms", "second_ms"), ms, strict=True))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _fill(self, batch: int, params: SamplingParams) -> None:
        """Requests that decode and have room to go on, nothing in flight."""
        params = replace(params, max_tokens=200).resolve({}, [])
        for i in range(batch):
            self.engine.add(f"fill{i}", random_prompt(self.context, self.engine.vocab_size), params)
        scheduler = self.engine.scheduler
        while not only_decodes(scheduler):
            self.engine.step()
        for _ in range(4):
            self.engine.step()
        while self.engine._in_flight:
            self.engine._collect(self.engine._in_flight.popleft())

    def _empty(self) -> None:
        for request in list(self.engine.scheduler.requests):
            self.engine.abort(request)
        drain(self.engine)


def run_parts(bench: Bench, parts: list[str], write: Callable[[dict[str, Any]], None]) -> None:
    for part in parts:
        began = time.perf_counter()
        try:
            found = getattr(bench, part)()
        except Exception as e:  # the other parts are still worth having
            traceback.print_exc()
            found = {"error": f"{type(e).__name__}: {e}"}
        write({"part": part, "took_s": round(time.perf_counter() - began, 1)} | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="qwen3-0.6b")
    parser.add_argument("--fused", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    if args.tiny:
        shapes.SHAPES["tiny"] = TINY
        args.shape = "tiny"
    parts = args.parts.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"no such parts: {', '.join(sorted(unknown))}")
    with shapes.shape_folder(args.shape) as folder:
        bench = Bench(args, folder)
    config = bench.engine.config
    about = environment(config.device) | {
        "bench": "gpu", "shape": args.shape, "fused": config.fused_kernels, "attention": config.attention,
        "page_size": config.page_size,
    }  # fmt: skip

    def write(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as f:
                f.write(json.dumps(about | row) + "\n")

    run_parts(bench, parts, write)


if __name__ == "__main__":
    main()
