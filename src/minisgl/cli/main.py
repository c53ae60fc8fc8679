"""Finds the command, runs it, and turns errors meant for the user into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Protocol

from minisgl import __version__
from minisgl.types import MinisglError

COMMANDS = ("serve", "shell", "generate", "bench", "doctor", "profile")  # modules of this package
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT


class Command(Protocol):
    """A module of this package that is a command. It imports what is slow to load inside `run`."""

    HELP: str

    def add_options(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> None: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 after an error, 130 after Ctrl-C. Wrong usage exits with 2 by SystemExit.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not args:
        parser.print_help()
        return 0
    if args[0].startswith("-") and args[0] not in ("-h", "--help", "--version"):
        args.insert(0, _take_command(args))
    parsed = parser.parse_args(args)
    try:
        parsed.command.run(parsed)
    except MinisglError as error:
        print(f"minisgl: error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return 0


def _take_command(args: list[str]) -> str:
    """What `python -m minisgl --model M` means: serve, or shell if --shell is among the options."""
    if "--shell" not in args:
        return "serve"
    args.remove("--shell")
    return "shell"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisgl",
        description="A compact inference engine for large language models.",
        epilog="Options without a command mean serve, or with --shell shell: python -m minisgl --model M --shell.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minisgl {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        command: Command = importlib.import_module(f"minisgl.cli.{name}")
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        sub.set_defaults(command=command)
        command.add_options(sub)
    return parser
