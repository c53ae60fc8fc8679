"""`minisgl profile report`: the pages, plots and the HTML file, from the JSON of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "render the reports from the JSON of runs: Markdown, plots and one HTML file"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/profile"), metavar="DIR", help="of the run's JSON")
    parser.add_argument(
        "--also", type=Path, action="append", default=[], metavar="DIR", help="more JSON; may be repeated"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="for the reports (default: report/ in --out)")
    parser.add_argument(
        "--write-reports",
        action="store_true",
        help="keep the run's JSON in reports/data/MACHINE and render reports/ from all that lies there",
    )


def run(args: argparse.Namespace) -> None:
    """Renders and says where.

    Raises:
        MinisglError: there is nothing to render, or it can't be written.
    """
    from minisgl.profiling.report import keep, write_reports

    if args.write_reports:
        data = Path("reports/data")
        keep(args.out, data)
        folders, target = sorted(path for path in data.iterdir() if path.is_dir()), Path("reports")
    else:
        folders, target = [args.out, *args.also], args.to or args.out / "report"
    written = write_reports(folders, target)
    print(f"{len(written)} files written to {target}; open {target / 'report.html'}, or read {target / 'INDEX.md'}")
