"""`minisgl profile attention`: prefill and decode over batches and lengths, each backend."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minisgl.cli.lab import page

if TYPE_CHECKING:
    from minisgl.profiling.attention import Workload

HELP = "measure attention: prefill and decode by each backend, TFLOP/s and TB/s against the ceilings"
# (batch, context) of decodes; (sequences, tokens, cached tokens before them) of prefills
DECODES = {"cuda": ((1, 672), (8, 672), (32, 672), (128, 672), (256, 672), (1, 4096), (8, 4096), (1, 16384)),
           "cpu": ((1, 128), (1, 512), (4, 512), (16, 512), (1, 2048))}  # fmt: skip
PREFILLS = {"cuda": ((32, 512, 0), (8, 2048, 0), (4, 4000, 0), (1, 2048, 2048), (8, 256, 2048)),
            "cpu": ((1, 128, 0), (1, 512, 0), (4, 128, 0), (1, 128, 384))}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--model", help="whose heads (default: qwen3-0.6b on a GPU, smollm2-135m on a CPU)")


def run(args: argparse.Namespace) -> None:
    """Prints a row a workload and backend; writes attention.json.

    Raises:
        ConfigError: a model that isn't known.
    """
    from minisgl.profiling.attention import MODELS, backends, measure
    from minisgl.profiling.ceilings import measure_ceilings
    from minisgl.profiling.record import new_record
    from minisgl.types import ConfigError

    record = new_record("attention", args.quick)
    device = record.hardware["device"]
    model = args.model or {"cuda": "qwen3-0.6b", "cpu": "smollm2-135m"}[device]
    if model not in MODELS:
        raise ConfigError(f"--model is {model!r}; expected one of: {', '.join(MODELS)}")
    record = replace(record, ceilings=measure_ceilings(args.quick))
    works, found, rows = workloads(device, model, args.quick), backends(device, record), []
    with page.progress("attention", len(works) * len(found)) as advance:
        for work in works:
            for backend in found:
                rows.append(measure(work, backend, record.ceilings, samples=5 if args.quick else 9))
                advance()
    page.ceilings(record)
    columns = ("work:", "backend:", "µs (p10–p90)", "TFLOP/s", "TB/s", "floor µs", "of")
    names = [work.name for work in works for _ in found]
    page.table(f"attention, a layer of {model}", columns, (_line(*each) for each in zip(names, rows, strict=True)))
    page.finish(replace(record, rows=rows, summary={"model": model}), args.out)


def workloads(device: str, model: str, quick: bool) -> list[Workload]:
    """What is measured on `device`: float32 on a CPU, bfloat16 on a GPU; two of each phase if `quick`."""
    import torch

    from minisgl.profiling.attention import decodes, prefills

    most = 2 if quick else None
    more: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    return [*decodes(model, DECODES[device][:most], **more), *prefills(model, PREFILLS[device][:most], **more)]


def _line(name: str, row: dict[str, Any]) -> tuple[object, ...]:
    rates = f"{row['tflops']:.3g}", f"{row['gbps'] / 1e3:.3g}"
    return (name, row["backend"], page.us(row), *rates, f"{row['floor_us']:.2f}", page.of_limit(row))
