"""`minisgl profile compare`: a run beside reference figures, the hardware's limits, and an earlier run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "compare a run with expected figures, its floors and an earlier run; rank the discrepancies"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/profile"), metavar="DIR", help="of the run, and the JSON")
    parser.add_argument("--reference", default="a100", metavar="NAME", help="a set of figures (default: %(default)s)")
    parser.add_argument("--earlier", type=Path, metavar="DIR", help="JSON of an earlier run: flags what got slower")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if something got slower")


def run(args: argparse.Namespace) -> None:
    """Prints what can't be in the reference and the ranked discrepancies; writes compare.json.

    Raises:
        MinisglError: there is no such reference, or no record in a folder.
        SystemExit: code 1 for a regression, with --fail.
    """
    from minisgl.profiling.compare import compare, load_runs
    from minisgl.profiling.expected import load_reference
    from minisgl.types import MinisglError

    reference = load_reference(args.reference)
    runs, earlier = load_runs(args.out), load_runs(args.earlier) if args.earlier else None
    for folder, found in ((args.out, runs), (args.earlier, earlier)):
        if found is not None and not found:
            raise MinisglError(f"{folder} holds no records; `minisgl profile env --out {folder}` makes the first")
    record = compare(runs, reference, earlier)
    print(f"what can't be in the {reference.name}:")
    for finding in record.summary["findings"]:
        print(f"  {finding['severity']:13} {reference.figure(finding['figure']).what}: {finding['text']}")
    print("discrepancies, the largest first:")
    for row in record.rows:
        print(
            f"  {row['ratio']:8.2f}× {row['what']} (against {row['against']}): {row['measured_us']:.2f} µs, "
            f"expected {row['expected_us']:.2f}\n{'':12}{row['cause']}; next: {row['next']}"
        )
    print(f"written to {record.write(args.out)}")
    if args.fail and record.summary["regressions"]:
        raise SystemExit(1)
