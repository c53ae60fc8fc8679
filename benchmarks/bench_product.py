"""What a person notices on a CPU, for the default model: speed, start, memory, prefix hits, streams that don't stall.

    python benchmarks/bench_product.py [--no-save]

Each row has its goal beside it. Take it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_engine import bench_decode, bench_prefill, drain, random_prompt
from common import append_line, environment

from minisgl.cache.prefix import make_prefix_cache
from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.engine.scheduler import ScheduledBatch, Scheduler
from minisgl.models.hub import resolve_model
from minisgl.text import load_text
from minisgl.types import Request, SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
STREAMS, LONG_PROMPT = 64, 50_000
TINY = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def speeds(engine: Engine) -> Iterator[tuple[str, float, str, str]]:
    for batch, goal in ((1, "60"), (16, "270")):
        step = statistics.median(bench_decode(engine, batch, 128, 48))
        yield f"decode, {batch} stream{'s' * (batch > 1)}", batch / step, "tok/s", f"at least {goal}"
    yield "prefill, 512 tokens", 512 / statistics.median(bench_prefill(engine, 1, 512, 5)), "tok/s", "at least 400"


def prefix_hit(engine: Engine) -> tuple[str, float, str, str]:
    """How many times sooner the first token comes when 1,000 tokens before the question are cached."""

    def first_token(prompt: array[int], name: str) -> float:
        began = time.perf_counter()
        engine.add(name, prompt, SamplingParams(temperature=0.0, max_tokens=1).resolve({}, []))
        drain(engine)
        return time.perf_counter() - began

    ratios = []
    for i in range(3):
        system = random_prompt(1000, engine.vocab_size)
        cold = first_token(system + random_prompt(12, engine.vocab_size), f"cold{i}")
        warm = first_token(system + random_prompt(12, engine.vocab_size), f"warm{i}")
        ratios.append(cold / warm)
    return "first token after a prefix hit", statistics.median(ratios), "times sooner", "at least 8"


def second_start() -> tuple[str, float, str, str]:
    """Seconds from the start of the command to the first character of the answer, the second time."""
    for _ in range(2):
        began = time.perf_counter()
        command = [sys.executable, "-m", "minisgl", "generate", "Hello", "--temperature", "0", "--max-tokens", "4"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - began
    return "second start to first token", seconds, "s", "at most 5"


def resident_memory() -> tuple[str, float, str, str]:
    """Of a fresh process that has answered, and has written to all of its KV pool."""
    script = (
        "from minisgl import LLM, SamplingParams\n"
        "llm = LLM(); llm.generate('Hello', SamplingParams(max_tokens=4))\n"
        "pool = llm.engine.runner.pool; pool.k.fill_(1); pool.v.fill_(1)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return "resident memory, model and full pool", int(out.split()[-1]) / 1e6, "GB", "at most 1.5"


def scheduling(context: int) -> float:
    """Milliseconds of the scheduler's Python a decode step of 256 requests: choosing and collecting."""
    scheduler = Scheduler(256 * (context + 400) // 16, 16, 256, 16384, 100_000, make_prefix_cache(16))
    for i in range(256):
        prompt = array("i", [(i * 7 + k) % 1000 for k in range(context)])
        scheduler.add(Request(str(i), prompt, SamplingParams(max_tokens=300, stop_token_ids=(5000,)).resolve({}, [])))
    times, previous = [], ScheduledBatch(-1)
    for _ in range(256 * context // 16384 + 200):
        began = time.perf_counter()
        batch = scheduler.schedule()
        scheduler.collect(previous, [1] * sum(previous.samples)) if previous.requests else None
        if batch.num_decodes == 256:
            times.append(time.perf_counter() - began)
        previous = batch
    return 1e3 * statistics.median(times)


@contextmanager
def tiny_server() -> Iterator[int]:
    """A server of random weights and the default model's tokenizer; yields its port."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TINY))
        tokenizer: Any = load_text(resolve_model("smollm2")).require_tokenizer()
        tokenizer.backend.save(str(Path(folder, "tokenizer.json")))
        command = [sys.executable, "-m", "minisgl", "serve", "--model", folder, "--dummy-weights", "--port", "0"]
        command += ["--max-running", str(STREAMS), "--device", "cpu"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline().rpartition(":")[2])
        finally:
            server.terminate()
            server.wait()


async def stream(port: int, prompt: str, max_tokens: int, arrivals: list[float]) -> None:
    """Streams one completion, noting when each event came."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + data)
    while line := await reader.readline():
        if line.startswith(b"data:"):
            arrivals.append(time.perf_counter())
    writer.close()


async def longest_gaps(port: int) -> tuple[float, float]:
    """The longest silence of any of 64 streams, in ms: before, and from the sending of a long prompt on."""
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    tasks = [asyncio.create_task(stream(port, f"Story {i}", 600, a)) for i, a in enumerate(arrivals)]
    while min(map(len, arrivals)) < 100:
        await asyncio.sleep(0.02)
    sent = time.perf_counter()
    await stream(port, " ".join(random.choices(["hello", "world", "paged", "cache"], k=LONG_PROMPT)), 1, [])
    answered = time.perf_counter()
    await asyncio.gather(*tasks)
    before, after = 0.0, 0.0
    for times in arrivals:
        for a, b in pairwise(times[20:]):
            if b < sent:
                before = max(before, b - a)
            elif a < answered:
                after = max(after, b - a)
    return 1e3 * before, 1e3 * after


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to results/product.jsonl")
    args = parser.parse_args()
    random.seed(0)
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, goal: str) -> None:
        rows.append({"row": name, "value": round(value, 3), "unit": unit, "goal": goal})
        print(f"{name:44}{value:9.2f} {unit:14}{goal}", flush=True)

    where = environment("cpu")
    print(f"{where['hardware']}, load {os.getloadavg()[0]:.1f}")
    measures: tuple[Callable[[], tuple[str, float, str, str]], ...] = (second_start, resident_memory)
    for measure in measures:
        add(*measure())
    with tiny_server() as port:
        before, after = asyncio.run(longest_gaps(port))
    add("64 streams, longest silence", before, "ms", "")
    add("… while 50,000 tokens are tokenized", after, "ms", "at most 250")
    for context in (100, 4000):
        add(f"scheduler, 256 requests of {context} tokens", scheduling(context), "ms a step", "at most 0.2")
    engine = Engine(EngineConfig(device="cpu", max_running=16))
    for row in speeds(engine):
        add(*row)
    add(*prefix_hit(engine))
    if not args.no_save:
        append_line("product.jsonl", where | {"bench": "product", "load": os.getloadavg()[0], "rows": rows})


if __name__ == "__main__":
    main()
