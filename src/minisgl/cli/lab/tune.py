"""`minisgl profile tune`: the kernels' launch configurations, measured on the GPU at hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minisgl.types import ConfigError

HELP = "measure the kernels' launch configurations on this GPU and keep the best"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, help="file for the table (default: in this user's cache, where it is used)"
    )
    parser.add_argument(
        "--products",
        metavar="MODELS",
        help="models, separated by commas: their products are measured beside cuBLAS (default: all known shapes)",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="measure nothing: put the products in FILE, a record of bench_gemm.py, into the table at --output",
    )


def run(args: argparse.Namespace) -> None:
    """Tunes and writes the table."""
    from minisgl.profiling.products import MODELS, rows_of
    from minisgl.profiling.shapes import SHAPES
    from minisgl.profiling.tune import tune, with_products, write_table

    models = MODELS if args.products is None else [name for name in args.products.split(",") if name]
    unknown = [name for name in models if name not in SHAPES]
    if unknown:
        raise ConfigError(f"--products: no shape is known of {', '.join(unknown)}; known are {', '.join(SHAPES)}")
    if args.measured and not (args.output and args.output.is_file()):
        raise ConfigError("--measured needs --output, a table to put the products into")
    if args.measured:
        table = with_products(json.loads(args.output.read_text(encoding="utf-8")), rows_of(args.measured))
    else:
        table = tune(models)
    print(f"table written to {write_table(table, args.output)}; used from the next start on")
