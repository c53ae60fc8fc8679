"""`minisgl profile ncu`: a command under Nsight Compute, its counters read and interpreted."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.cli.lab import page, tool
from minisgl.types import MinisglError

if TYPE_CHECKING:
    from minisgl.profiling.ncu import Rule

HELP = "run a command under Nsight Compute: each kernel's counters, and what they advise"
INSTALL = (
    "install Nsight Compute (package nsight-compute of NVIDIA's CUDA repository, or "
    "https://developer.nvidia.com/nsight-compute) and put it on the PATH"
)
DEFAULT = ("profile", "kernels", "--quick")
OURS = "^(_|index_|store_|rmsnorm|rope|silu_mul|qkv_post|skinny_gemm)"  # Triton's begin with an underscore
LAUNCHES = 500


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="read what ncu --csv --page raw wrote; run nothing")
    parser.add_argument("--kernels", metavar="REGEX", help="only kernels whose name matches (default: all of COMMAND)")
    parser.add_argument("--launches", type=int, metavar="N", help=f"at most (default: {LAUNCHES}; quick: 50)")
    tool.add_program(parser, DEFAULT)


def run(args: argparse.Namespace) -> None:
    """Prints a row a kernel and the rules with those that they apply to; writes ncu.csv and ncu.json.

    Raises:
        MinisglError: Nsight Compute isn't installed, may not read the counters, or saw no kernel.
    """
    from minisgl.profiling import ncu
    from minisgl.profiling.record import new_record

    text = _read(args.csv if args.csv is not None else _measure(args))
    rows = ncu.parse(text)
    rules = ncu.rules(rows)
    for row in rows:
        row["advice"] = [rule.advice for rule in rules if row["kernel"] in rule.kernels]
    page.table("kernels", COLUMNS, (_line(row) for row in rows))
    _print(rules)
    summary = {"rules": [{"when": r.when, "advice": r.advice, "kernels": r.kernels} for r in rules]}
    page.finish(replace(new_record("ncu", args.quick), rows=rows, summary=summary), args.out)


def _measure(args: argparse.Namespace) -> Path:
    """Runs the command under ncu, which writes the table that is returned."""
    from minisgl.profiling.ncu import REQUESTED, SECTIONS

    ncu, out = tool.find("ncu", INSTALL), Path(args.out)
    ours = args.program == list(DEFAULT)
    program = [*tool.program(args.program), *(("--out", str(out / "under-ncu")) if ours else ())]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "ncu.csv"
    log.unlink(missing_ok=True)
    sections = [word for section in SECTIONS for word in ("--section", section)]
    names = args.kernels or (OURS if ours else None)
    chosen = ["--kernel-name", f"regex:{names}"] if names else []
    count = args.launches or (50 if args.quick else LAUNCHES)
    command = [
        ncu, *sections, "--metrics", ",".join(REQUESTED), "--target-processes", "all", "--clock-control", "none",
        *chosen, "--launch-count", str(count), "--csv", "--page", "raw", "--log-file", str(log), *program,
    ]  # fmt: skip
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


def _print(rules: list[Rule]) -> None:
    for rule in rules:
        print(f"{rule.when}: {rule.advice}")
        for kernel in rule.kernels:
            print(f"  {kernel}")
        if not rule.kernels:
            print("  (none)")
