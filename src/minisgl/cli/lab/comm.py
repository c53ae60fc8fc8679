"""`minisgl profile comm`: collectives between the ranks of a model, by operation, path and size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from minisgl.cli.lab import page
from minisgl.profiling.shapes import SHAPES
from minisgl.types import ConfigError

HELP = "measure collectives: every path and size, which path wins where, and their share of a decode step"


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--tp", type=int, metavar="N", help="ranks (default: a GPU each, a power of two; 2 on a CPU)")
    parser.add_argument("--shape", choices=list(SHAPES), help="the model (default: qwen3-8b on a GPU, else smollm2)")


def run(args: argparse.Namespace) -> None:
    """Prints the tables; writes comm.json.

    Raises:
        ConfigError: ranks or a shape that can't be.
    """
    from minisgl.hardware import detect
    from minisgl.profiling import comm

    if args.tp is not None and args.tp < 1:
        raise ConfigError(f"--tp is {args.tp}; expected 1 or more ranks")
    model = args.shape or ("qwen3-8b" if detect().cuda else "smollm2")
    record = comm.run(args.tp or comm.default_world(), model, args.quick)
    where = f"{record.summary['world']} ranks on {record.hardware['name']}"
    for op in ("all_reduce", "all_gather", "copy"):
        _times(f"{op}, {where}: µs", [row for row in record.rows if row["op"] == op])
    _best("fastest all-reduce", comm.crossovers(record.rows, "all_reduce"))
    _start(record.summary)
    _share(record.summary)
    page.finish(record, args.out)


def _times(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A line a size: the time of each path, then the bandwidths of the fastest."""
    if not rows:
        return
    paths = list(dict.fromkeys(row["path"] for row in rows))
    lines = []
    for size in dict.fromkeys(row["bytes"] for row in rows):
        at = {row["path"]: row for row in rows if row["bytes"] == size}
        best = min(at.values(), key=lambda row: row["us"]["median"])
        cells = [page.us(at[path]) + " *" * (at[path] is best) if path in at else None for path in paths]
        lines.append((bytes_text(size), *cells, f"{best['algo_gbps']:.2f}", f"{best['bus_gbps']:.2f}"))
    page.table(title, ("bytes", *paths, "* algorithm GB/s", "* bus GB/s"), lines)


def _best(title: str, ranges: Sequence[tuple[int, str]]) -> None:
    page.table(title, ("up to", "path:"), [(bytes_text(size), path) for size, path in ranges])


def _start(summary: dict[str, Any]) -> None:
    """What NCCL and the choice of paths cost; on a CPU there is neither."""
    if "probe_ms" not in summary:
        return
    for name in ("chosen", "chosen_workspace"):
        _best(f"{name.replace('_', ', tensor in a ')}", summary[name])
    parts = ", ".join(f"{part} {ms:.1f} ms" for part, ms in summary["start_ms"].items())
    print(f"start: {parts}; measuring the paths {summary['probe_ms']:.1f} ms; host {summary['host_us']:.1f} µs a call")


def _share(summary: dict[str, Any]) -> None:
    """Communication a layer and a token, beside the reading of a layer's weights."""
    title = f"{summary['model']}: two all-reduces a layer, {summary['layers']} layers, "
    title += f"weights of a layer in {summary['weights_us']:.1f} µs"
    lines = [
        (
            b["batch"],
            bytes_text(b["bytes"]),
            b["path"],
            *(f"{b[k]:.1f}" for k in ("layer_us", "token_us")),
            f"{b['share']:.0%}",
        )
        for b in summary["batches"]
    ]
    page.table(title, ("batch", "bytes", "path:", "µs a layer", "µs a token", "share at most"), lines)


def bytes_text(count: int) -> str:
    """`4 KiB`, `1 MiB`; bytes where neither is whole."""
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if count >> shift and not count & ((1 << shift) - 1):
            return f"{count >> shift} {unit}"
    return f"{count} B"
