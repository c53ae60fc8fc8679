"""`minisgl bench offline`: how fast the engine gets through a heap of random prompts."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.cli import options
from minisgl.cli.bench_options import Range, length_range
from minisgl.cli.bench_record import environment, save
from minisgl.profiling.shapes import SHAPES, shape_folder
from minisgl.types import ConfigError, RequestError, SamplingParams

if TYPE_CHECKING:
    from minisgl.config import EngineConfig
    from minisgl.llm import LLM
    from minisgl.profiling.floor import Cost, Speed

HELP = "Measure how fast the engine gets through random prompts."
CONTEXT = 4096  # or the model's, if that is less
MAX_TOKEN_ID = 10_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """The defaults are the workload 'offline256' of docs/bench.md."""
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights of this model's shape, instead of --model"
    )
    parser.add_argument("--num-prompts", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--input-len", type=length_range, default=Range(100, 1024), metavar="A:B", help="(100:1024)")
    parser.add_argument("--output-len", type=length_range, default=Range(100, 1024), metavar="A:B", help="(100:1024)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="append the result as a line of JSON")
    options.add_engine_options(parser)
    parser.set_defaults(max_running=256, max_batched_tokens=16384)


def run(args: argparse.Namespace) -> None:
    """Prints what the hardware allows, then what the engine reached.

    Raises:
        MinisglError: wrong options, or a model that can't be loaded.
    """
    if args.num_prompts < 1:
        raise ConfigError(f"num-prompts is {args.num_prompts}; expected at least 1")
    save(args.save)
    with _config(args) as config:
        from minisgl import hardware
        from minisgl.config import resolve
        from minisgl.profiling import floor

        resolved = resolve(config, hardware.detect())
        speed = floor.measure(resolved.device, resolved.dtype)  # before the engine takes memory and threads
        from minisgl.llm import LLM

        llm = LLM(**{name: getattr(config, name) for name in options.ENGINE_OPTIONS})
        work = draw(args.num_prompts, args.input_len, args.output_len, config.seed, llm.engine.vocab_size)
        _check_fits(work, llm)
        cost = floor.workload_cost(llm.engine, [len(p) for p in work.prompts], work.outputs)
        print(_told(args, llm, work))
        _print_floor(cost, speed, work)
        seconds, num_tokens = measure(llm, work)
    record = _record(args, llm, work, cost, speed, seconds, num_tokens)
    rate = num_tokens / seconds
    print(
        f"engine  {rate:>10,.0f} tok/s  {seconds:8.2f} s  {cost.seconds(speed) / seconds:.0%} of the floor; "
        f"{(work.num_input + num_tokens) / seconds:,.0f} tok/s with the prompts, "
        f"{record['preemptions']} preemptions"
    )
    save(args.save, record)


@contextmanager
def _config(args: argparse.Namespace) -> Iterator[EngineConfig]:
    """The engine's configuration; the folder of a shape lives as long as the context."""
    config = options.engine_config(args)
    if args.shape is None:
        yield _with_context(config)
    else:
        with shape_folder(args.shape) as folder:
            yield _with_context(replace(config, model=str(folder), dummy_weights=True))


def _with_context(config: EngineConfig) -> EngineConfig:
    from minisgl.models.hub import resolve_model
    from minisgl.models.registry import read_config

    if config.max_model_len is not None:
        return config
    return replace(config, max_model_len=min(CONTEXT, read_config(resolve_model(config.model)).max_position))


# -- the workload --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts as token ids, and how many tokens each is to be answered with."""

    prompts: list[list[int]]
    outputs: list[int]

    @property
    def num_input(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output(self) -> int:
        return sum(self.outputs)


def draw(count: int, inputs: Range, outputs: Range, seed: int, vocab_size: int) -> Work:
    """The workload: all prompts one after the other (length, then ids from 0 to 10,000), then all output lengths."""
    rng = random.Random(seed)
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    lengths = (rng.randint(*inputs) for _ in range(count))
    prompts = [[rng.randint(0, top) for _ in range(length)] for length in lengths]
    return Work(prompts, [rng.randint(*outputs) for _ in range(count)])


def _check_fits(work: Work, llm: LLM) -> None:
    longest = max(len(p) + n for p, n in zip(work.prompts, work.outputs, strict=True))
    if longest > llm.engine.max_total_tokens:
        raise ConfigError(
            f"the longest request has {longest} tokens, the engine takes {llm.engine.max_total_tokens}; lower "
            "--input-len or --output-len, or raise --max-model-len (and --num-pages)"
        )


def measure(llm: LLM, work: Work) -> tuple[float, int]:
    """Seconds from the first request to the last answer, after one short request to warm up, and output tokens."""
    from rich.console import Console
    from rich.progress import track

    params = SamplingParams(temperature=0.6, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, ignore_eos=True)
    llm.generate([work.prompts[0][:16]], replace(params, max_tokens=4))
    pairs = zip(work.prompts, work.outputs, strict=True)
    requests = [(i, prompt, replace(params, max_tokens=length)) for i, (prompt, length) in enumerate(pairs)]
    began, num_tokens = time.perf_counter(), 0
    results = llm.run(requests, max_in_flight=len(requests))
    for _, result in track(results, "Generating", len(requests), console=Console(stderr=True), transient=True):
        if isinstance(result, RequestError):
            raise result
        num_tokens += len(result.token_ids)
    return time.perf_counter() - began, num_tokens


# -- what is told --------------------------------------------------------------------------------------------------


def _place(llm: LLM) -> str:
    from minisgl.hardware import detect

    machine = detect()
    if llm.engine.config.device == "cuda" and machine.cuda is not None:
        return machine.cuda.name
    return f"{machine.cpu}, {machine.num_cores} cores"


def _told(args: argparse.Namespace, llm: LLM, work: Work) -> str:
    config = llm.engine.config
    random_weights = ", random weights" if config.dummy_weights else ""
    return (
        f"{args.shape or args.model} ({config.dtype}{random_weights}) on {_place(llm)}\n"
        f"{len(work.prompts)} prompts, {work.num_input:,} tokens in, {work.num_output:,} out; at most "
        f"{config.max_running} requests and {config.max_batched_tokens} tokens a step, seed {config.seed}"
    )


def _print_floor(cost: Cost, speed: Speed, work: Work) -> None:
    floor = cost.seconds(speed)
    memory, arithmetic = cost.bytes / speed.bytes, cost.flops / speed.flops
    print(
        f"floor   {work.num_output / floor:>10,.0f} tok/s  {floor:8.2f} s  "
        f"memory {memory:.2f} s at {speed.bytes / 1e9:,.0f} GB/s, "
        f"arithmetic {arithmetic:.2f} s at {speed.flops / 1e12:,.2f} TFLOP/s, both measured"
    )


def _record(
    args: argparse.Namespace, llm: LLM, work: Work, cost: Cost, speed: Speed, seconds: float, num_tokens: int
) -> dict[str, Any]:
    engine, stats = llm.engine, llm.engine.stats()
    settings = {name: getattr(engine.config, name) for name in options.ENGINE_OPTIONS}
    settings |= {"model": args.shape or args.model, "num_pages": stats.num_pages}
    cache = engine.scheduler.ledger.cache
    floor = cost.seconds(speed)
    return environment() | {
        "bench": "offline",
        "hardware": _place(llm),
        "settings": settings,
        "prefix_cache": None if cache is None else type(cache).__module__,
        "num_prompts": len(work.prompts),
        "input_len": list(args.input_len),
        "output_len": list(args.output_len),
        "input_tokens": work.num_input,
        "output_tokens": num_tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(num_tokens / seconds, 1),
        "floor_seconds": round(floor, 4),
        "floor_tokens_per_second": round(work.num_output / floor, 1),
        "bandwidth_gb_s": round(speed.bytes / 1e9, 1),
        "tflop_s": round(speed.flops / 1e12, 3),
        "preemptions": stats.preemptions,
    }
