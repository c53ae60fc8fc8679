"""`minisgl profile ncu`: a command under Nsight Compute, its counters read and interpreted."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.cli.lab import page, tool
from minisgl.types import ConfigError, MinisglError

if TYPE_CHECKING:
    from minisgl.profiling.record import Record

HELP = "run a command under Nsight Compute: each kernel's counters, and what they advise"
INSTALL = (
    "install Nsight Compute (package nsight-compute of NVIDIA's CUDA repository, or "
    "https://developer.nvidia.com/nsight-compute) and put it on the PATH"
)
LAUNCHES = 500
LIMIT_S = 100.0  # for the engine's own kernels, which take well under ten seconds a name


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="read what ncu --csv --page raw wrote; run nothing")
    parser.add_argument("--kernels", metavar="REGEX", help="only kernels whose name matches (default: all)")
    parser.add_argument("--launches", type=int, metavar="N", help=f"at most (default: {LAUNCHES}; quick: 50)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S",
        help=f"without a COMMAND: what isn't counted after S seconds is left out (default: {LIMIT_S:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "program", nargs="*", metavar="-- COMMAND",
        help="what to run: arguments of minisgl, or another program (default: the engine's kernels, a launch a size)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Prints a row a kernel and the rules with those that they apply to; writes ncu.csv and ncu.json.

    Raises:
        MinisglError: Nsight Compute isn't installed, may not read the counters, or saw no kernel.
    """
    from minisgl.profiling import ncu
    from minisgl.profiling.record import new_record

    record = new_record("ncu", args.quick)
    if args.csv is None and not args.program:
        _count_ours(record, args)
    else:
        record.rows.extend(ncu.parse(_read(args.csv if args.csv is not None else _measure(args))))
        _interpret(record)
    page.table("kernels", COLUMNS, (_line(row) for row in record.rows))
    _print(record.summary["rules"])
    page.finish(record, args.out)


def _interpret(record: Record) -> None:
    """Fills in what the rules advise, row by row."""
    from minisgl.profiling.ncu import RULES, label

    for row in record.rows:
        row["advice"] = [rule.advice for rule in RULES if rule.holds(row)]
    record.summary["rules"] = [
        {"when": rule.when, "advice": rule.advice, "kernels": [label(row) for row in record.rows if rule.holds(row)]}
        for rule in RULES
    ]


def _count_ours(record: Record, args: argparse.Namespace) -> None:
    """The engine's kernels, each name in a process of its own; the record is written after each of them.

    Raises:
        MinisglError: nothing could be counted.
    """
    from minisgl.profiling import ncu
    from minisgl.profiling.counted import COUNTED

    names = [name for name in COUNTED if args.kernels is None or re.search(args.kernels, name)]
    if not names:
        raise ConfigError(f"--kernels matches none of: {', '.join(COUNTED)}; a COMMAND behind -- may launch others")
    tool_path, until = tool.find("ncu", INSTALL), time.monotonic() + args.limit
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names[: 2 if args.quick else None]:
        log = args.out / f"ncu-{name}.csv"
        why = _count(tool_path, name, log, until - time.monotonic())
        try:
            found = ncu.parse(_read(log)) if log.is_file() else []
        except MinisglError as error:
            found, why = [], str(error)
        record.rows.extend({"of": name, **row} for row in found)
        if why is not None:
            record.skip(f"ncu {name}", why)
        _interpret(record)
        record.write(args.out)
    if not record.rows:
        raise MinisglError(f"nothing was counted: {record.skipped[0]['why']}")


def _count(tool_path: str, name: str, log: Path, seconds: float) -> str | None:
    """Counts the launches of one name into `log`; why that came to no end, if it didn't."""
    from minisgl.profiling.counted import COUNTED
    from minisgl.profiling.ncu import BRIEF

    log.unlink(missing_ok=True)
    if seconds <= 0:
        return "the time was up"
    launched = [sys.executable, "-m", "minisgl.profiling.counted", name]
    command = [
        *_command(tool_path, BRIEF, log, "application-only"), "--profile-from-start", "off",
        "--kernel-name", f"regex:{COUNTED[name]}", *launched,
    ]  # fmt: skip
    code = tool.run_limited(command, seconds)
    if code is None:
        return "the time was up before it was through"
    return None if code == 0 or log.is_file() else f"ncu ended with exit code {code} and wrote nothing"


def _command(tool_path: str, sections: Sequence[str], log: Path, processes: str) -> list[str]:
    """How ncu is called, but for what it looks at."""
    from minisgl.profiling.ncu import REQUESTED

    chosen = [word for section in sections for word in ("--section", section)]
    return [
        tool_path, *chosen, "--metrics", ",".join(REQUESTED),
        "--target-processes", processes, "--clock-control", "none", "--csv", "--page", "raw", "--log-file", str(log),
    ]  # fmt: skip


def _measure(args: argparse.Namespace) -> Path:
    """Runs the command under ncu, which writes the table that is returned."""
    from minisgl.profiling.ncu import SECTIONS

    tool_path, log = tool.find("ncu", INSTALL), Path(args.out) / "ncu.csv"
    program = tool.program(args.program)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    chosen = ["--kernel-name", f"regex:{args.kernels}"] if args.kernels else []
    count = args.launches or (50 if args.quick else LAUNCHES)
    command = [*_command(tool_path, SECTIONS, log, "all"), *chosen, "--launch-count", str(count), *program]
    code = tool.run(command)
    if not log.is_file():
        raise MinisglError(f"ncu ended with exit code {code} and wrote nothing; what it said is above")
    return log


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MinisglError(f"can't read {path}: {error.strerror}") from None


COLUMNS = (
    "kernel:", "grid × block:", "launches", "µs", "DRAM %", "SM %", "L2 hit %", "sectors/load", "sectors/store",
    "occupancy %", "registers", "spills", "stall:",
)  # fmt: skip


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    names = ("us", "dram_percent", "sm_percent", "l2_hit_percent", "sectors_per_load", "sectors_per_store")
    figures = (_figure(row[name]) for name in (*names, "occupancy_percent", "registers", "spill_sectors"))
    return (row["kernel"][:48], f"{row['grid']} × {row['block']}", row["launches"], *figures, row["dominant_stall"])


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:,.4g}"


def _print(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        print(f"{rule['when']}: {rule['advice']}")
        for kernel in rule["kernels"] or ["(none)"]:
            print(f"  {kernel}")
