"""`minisgl profile rulings`: each claim about the kernels and the engine, measured and ruled on."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "rule on claims by interleaved A/B measurements"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--claims", metavar="ID,…", help="only these (default: all; --list names them)")
    parser.add_argument("--list", action="store_true", help="name the claims and measure nothing")
    parser.add_argument("--quick", action="store_true", help="one case a claim, five rounds")
    parser.add_argument(
        "--out", type=Path, default=Path("out/profile"), metavar="DIR", help="for the JSON (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Prints a verdict a claim and writes rulings.json.

    Raises:
        ConfigError: there is no such claim.
    """
    from minisgl.profiling.expected import load_claims
    from minisgl.types import ConfigError

    claims = load_claims()
    if args.list:
        print("\n".join(f"{claim.id:20} {claim.text}" for claim in claims))
        return
    if args.claims:
        wanted = args.claims.split(",")
        if unknown := sorted(set(wanted) - {claim.id for claim in claims}):
            raise ConfigError(f"there is no claim {', '.join(unknown)}; `minisgl profile rulings --list` names them")
        claims = [claim for claim in claims if claim.id in wanted]
    from minisgl.profiling.rulings import rule

    print(f"written to {rule(claims, args.quick).write(args.out)}")
