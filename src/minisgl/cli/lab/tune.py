"""`minisgl profile tune`: the kernels' launch configurations, measured on the GPU at hand."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "measure the kernels' launch configurations on this GPU and keep the best"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, help="file for the table (default: in this user's cache, where it is used)"
    )


def run(args: argparse.Namespace) -> None:
    """Tunes and writes the table."""
    from minisgl.profiling.tune import tune, write_table

    print(f"table written to {write_table(tune(), args.output)}; used from the next start on")
