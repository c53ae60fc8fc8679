"""`minisgl profile`: what the hardware at hand allows, measured."""

from __future__ import annotations

import argparse
import importlib

HELP = "measure this machine"
# Modules of `minisgl.cli.lab`.
ACTIONS = (
    *("env", "kernels", "index", "store", "attention", "comm", "tp"),
    *("request", "step", "load", "nsys", "ncu", "tune", "rulings", "compare", "report"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The actions of the command and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name in ACTIONS:
        module = importlib.import_module(f"minisgl.cli.lab.{name}")
        action = actions.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        action.set_defaults(action=module)
        module.add_options(action)


def run(args: argparse.Namespace) -> None:
    """Runs the action asked for."""
    args.action.run(args)
