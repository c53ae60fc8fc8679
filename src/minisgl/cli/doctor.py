"""`minisgl doctor`: what this machine is, what will run on it, and the command that mends what won't."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from minisgl import __version__
from minisgl.cli.doctor_checks import Check, diagnose, runs_on
from minisgl.cli.doctor_facts import look

HELP = "Tell what will run on this machine, and mend the rest."
_MARKS = {"ok": ("✓", "32"), "note": ("–", "33"), "fail": ("✗", "31")}  # and colours


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Prints the findings.

    Raises:
        SystemExit: code 1, if the default job (`minisgl generate` with the default model) would not run.
    """
    facts = look()
    checks = diagnose(facts)
    ok = all(check.status != "fail" for check in checks)
    if args.json:
        report = {"version": __version__, "ok": ok, "runs_on": runs_on(facts), "checks": [asdict(c) for c in checks]}
        print(json.dumps(report, indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(_page(checks, colour)))
        print(_verdict(checks, runs_on(facts)))
    if not ok:
        sys.exit(1)


def _page(checks: Sequence[Check], colour: bool) -> list[str]:
    lines = [f"minisgl {__version__}", ""]
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark, code = _MARKS[check.status]
        if colour:
            mark = f"\x1b[{code}m{mark}\x1b[0m"
        lines.append(f"{mark} {check.name:{width}}  {check.detail}")
        if check.fix is not None:
            lines.append(f"  {'':{width}}  → {check.fix}")
    return [*lines, ""]


def _verdict(checks: Sequence[Check], place: str) -> str:
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        return f"The default job would not run: mend {', '.join(failed)}."
    optional = " What is marked – is optional." if any(check.status == "note" for check in checks) else ""
    return f"The default job runs on {place}: minisgl generate 'Why is the sky blue?'{optional}"
