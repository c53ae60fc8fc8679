"""`minisgl profile load`: a model served by a process of its own, under load from clients."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisgl.cli import options
from minisgl.cli.lab import page

HELP = "serve a model, put load on the server, and keep what its clients felt"
_TIMES = {"ttft": "time to first token", "itl": "time between tokens", "e2e": "whole answer"}


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--num-requests", type=int, metavar="N", help="(default: 64; quick: 8)")
    parser.add_argument("--concurrency", type=int, metavar="N", help="under way at a time (default: 16; quick: 4)")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the clients' figures; writes load.json.

    Raises:
        MinisglError: the model can't be served, or no request was answered.
    """
    from minisgl.cli.lab.server import engine_arguments, serving
    from minisgl.profiling.record import new_record

    record = new_record("load", args.quick)
    count, concurrency = args.num_requests or (8 if args.quick else 64), args.concurrency or (4 if args.quick else 16)
    lengths = ("32", "8") if args.quick else ("256:512", "64:128")
    with serving(*engine_arguments(options.engine_config(args))) as server:
        found = _bench(server.port, count, concurrency, lengths)
    rows = [
        {"what": "requests a second", "value": found["requests_per_second"], "unit": "1/s"},
        {"what": "output tokens a second", "value": found["output_tokens_per_second"], "unit": "tok/s"},
    ]
    for name, what in _TIMES.items():
        for point, value in (found[f"{name}_ms"] or {}).items():
            rows.append({"what": f"{what}, {point}", "value": value, "unit": "ms"})
    found["settings"]["model"] = page.model_name(args.model)
    page.finish(replace(record, rows=rows, summary=found), args.out)


def _bench(port: int, count: int, concurrency: int, lengths: tuple[str, str]) -> dict[str, Any]:
    """`minisgl bench serve` against that port; what it keeps of a run."""
    from minisgl.cli import bench_serve

    parser = argparse.ArgumentParser(allow_abbrev=False)
    bench_serve.add_options(parser)
    with tempfile.TemporaryDirectory(prefix="minisgl-load-") as folder:
        kept = Path(folder) / "load.jsonl"
        words = ["--url", f"http://127.0.0.1:{port}", "--num-requests", str(count), "--concurrency", str(concurrency)]
        words += ["--input-len", lengths[0], "--output-len", lengths[1], "--save", str(kept)]
        bench_serve.run(parser.parse_args(words))
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found
