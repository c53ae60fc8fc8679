"""`minisgl profile index`: the embedding lookup over batches, widths, dtypes, versions and configurations."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from minisgl.cli.lab import page

HELP = "measure the embedding lookup: every version and configuration, against launch and bandwidth"


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Prints a row a case and version; writes index.json."""
    from minisgl.kernels.spec import registry
    from minisgl.profiling.ceilings import measure_ceilings
    from minisgl.profiling.record import new_record
    from minisgl.profiling.scatter import index_jobs, launch_ends, packed_rows, sweep

    record = new_record("index", args.quick)
    jobs = index_jobs(record.hardware["device"], args.quick)
    record = replace(record, ceilings=measure_ceilings(args.quick))
    with page.progress("index", len(jobs)) as advance:
        rows = sweep(registry()["index"], jobs, record, packed_rows, advance)
    page.ceilings(record)
    columns = (
        "rows",
        "width",
        "dtype:",
        "ids:",
        "version:",
        "configuration:",
        "µs (p10–p90)",
        "GB/s",
        "floor µs",
        "of",
    )
    page.table("index: rows of a table by id", columns, (_line(row) for row in rows))
    ends = launch_ends(rows)
    page.table("rows from which on the launch doesn't bind", ("width:", "rows"), ends.items())
    page.finish(replace(record, rows=rows, summary={"launch_ends": ends}), args.out)


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    case = row["case"]
    ids = f"{case['distinct']} repeated" if "distinct" in case else "random"
    about = (case["tokens"], case["width"], row["dtype"], ids, row["version"], page.config(row))
    return (*about, page.us(row), f"{row['gbps']:.1f}", f"{row['floor_us']:.2f}", page.of_limit(row))
