"""`minisgl profile`: what the hardware at hand allows, measured."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "measure this machine"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The actions of the command and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "measure the kernels' launch configurations on this GPU and keep the best"
    tune = actions.add_parser("tune", help=text, description=text, allow_abbrev=False)
    tune.add_argument(
        "--output", type=Path, help="file for the table (default: in this user's cache, where it is used)"
    )


def run(args: argparse.Namespace) -> None:
    """Tunes and writes the table."""
    from minisgl.profiling.tune import tune, write_table

    print(f"table written to {write_table(tune(), args.output)}; used from the next start on")
