"""`minisgl profile step`: one decode step, operator by operator and kernel by kernel."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minisgl.cli import options
from minisgl.cli.lab import page
from minisgl.profiling.shapes import SHAPES, shape_folder
from minisgl.types import ConfigError

if TYPE_CHECKING:
    from minisgl.config import EngineConfig

HELP = "measure one decode step: each operator's and kernel's time, bytes, floor, and the gaps between them"


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--batch", type=int, metavar="B", help="requests that decode (default: 8; quick: 2)")
    parser.add_argument("--context", type=int, metavar="C", help="tokens of each (default: 512; quick: 64)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps to take the mean of (default: 20; quick: 4)")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this model's shape, not --model")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the step's operators and kernels, the longest first; writes step.json.

    Raises:
        MinisglError: the model can't be loaded, or the batch doesn't fit.
    """
    defaults = {"batch": 2, "context": 64, "steps": 4} if args.quick else {"batch": 8, "context": 512, "steps": 20}
    given = {name: getattr(args, name) for name in defaults}
    sizes = {name: defaults[name] if value is None else value for name, value in given.items()}
    if min(sizes.values()) < 1:
        raise ConfigError("expected --batch, --context and --steps of at least 1")
    from minisgl.profiling import step
    from minisgl.profiling.ceilings import measure_ceilings
    from minisgl.profiling.record import new_record

    record = new_record("step", args.quick)
    ceilings = measure_ceilings(args.quick)  # before the engine takes memory and threads
    with _config(args) as asked:
        from minisgl.engine.engine import Engine

        if asked.tp_size > 1:
            raise ConfigError("the step of one rank is measured; leave --tp out")
        engine = Engine(step.engine_for(asked, **sizes))
        found = step.measure(engine, **sizes)
    on_gpu = engine.device.type == "cuda"
    rate = "cpu_tflops" if not on_gpu else "bf16_tflops" if engine.config.dtype != "float32" else "fp32_tflops"
    rows = step.rows(found, ceilings, on_gpu, rate)
    summary: dict[str, Any] = {"step_us": round(found.step_us, 3), "gaps_us": round(found.gaps_us, 3), **sizes}
    summary |= {"plain_step_us": round(found.plain_us, 3), "mean_context": round(found.context, 1)}
    summary |= {"model": args.shape or page.model_name(args.model), "dtype": engine.config.dtype, "route": found.route}
    summary["floor_us"] = round(sum(row["floor_us"] or 0.0 for row in rows), 3)
    record = replace(record, ceilings=ceilings, rows=rows, summary=summary)
    page.ceilings(record)
    _print(summary, rows)
    page.finish(record, args.out)


@contextmanager
def _config(args: argparse.Namespace) -> Iterator[EngineConfig]:
    """The engine's configuration; the folder of a shape lives as long as the context."""
    config = options.engine_config(args)
    if args.shape is None:
        yield config
    else:
        with shape_folder(args.shape) as folder:
            yield replace(config, model=str(folder), dummy_weights=True)


def _print(summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    title = (
        f"{summary['model']} ({summary['dtype']}): {summary['batch']} requests "
        f"of {summary['mean_context']:.0f} tokens; {summary['route']}"
    )
    columns = ("operator:", "kernel:", "calls", "µs", "share", "MB", "floor µs", "of floor", "limit:")
    page.table(title, columns, (_line(row, summary["step_us"]) for row in rows))
    step, gaps = summary["step_us"], summary["gaps_us"]
    print(
        f"step {step:,.1f} µs, of it gaps {gaps:,.1f} µs ({gaps / step:.1%}), floor of the operators "
        f"{summary['floor_us']:,.1f} µs ({summary['floor_us'] / step:.0%}); without the profiler the step takes "
        f"{summary['plain_step_us']:,.1f} µs"
    )


def _line(row: dict[str, Any], step_us: float) -> tuple[object, ...]:
    first = (row["operator"], row["kernel"][:48], f"{row['calls']:g}", f"{row['us']:.1f}", f"{row['us'] / step_us:.1%}")
    if row["floor_us"] is None:
        return (*first, None, None, None, None)
    return (*first, f"{row['bytes'] / 1e6:.2f}", f"{row['floor_us']:.1f}", f"{row['fraction']:.0%}", _limit(row))


def _limit(row: dict[str, Any]) -> str:
    """What binds; on a CPU small data is read faster than memory allows, since it never left a cache."""
    return f"{row['limit']} (cached)" if row["limit"] == "cpu" and row["fraction"] > 1 else str(row["limit"])
