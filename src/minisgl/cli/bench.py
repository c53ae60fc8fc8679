"""`minisgl bench`: the engine by itself, and any server with the OpenAI API. docs/bench.md defines what is measured."""

from __future__ import annotations

import argparse

from minisgl.cli import bench_offline, bench_serve

HELP = "Measure the engine, or any OpenAI server."
ACTIONS = {"offline": bench_offline, "serve": bench_serve}


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="WHAT", required=True)
    for name, module in ACTIONS.items():
        action = actions.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        action.set_defaults(action=module)
        module.add_options(action)


def run(args: argparse.Namespace) -> None:
    """Runs the benchmark asked for."""
    args.action.run(args)
