"""`minisgl profile tp`: the collectives of one decode step of a model that is split over ranks."""

from __future__ import annotations

import argparse
from collections import Counter

from minisgl.cli.lab import page

HELP = "split a model over ranks, and show when a decode step communicates (on a CPU over gloo)"


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Prints what a step's collectives take; writes tp.json.

    Raises:
        MinisglError: a rank failed.
    """
    from minisgl.profiling.tp_timeline import measure

    record = measure(args.quick)
    facts = record.summary
    print(
        f"{facts['model']}, {facts['world']} ranks ({facts['device']}), batch {facts['batch']}, context "
        f"{facts['context']}: {facts['step_us']:.0f} µs a step, {facts['share']:.0%} in {facts['calls']} collectives"
    )
    times: Counter[str] = Counter()
    for row in record.rows:
        times[row["op"]] += row["us"]
    counts = Counter(row["op"] for row in record.rows)
    lines = [(op, counts[op], f"{us:.0f}", f"{us / counts[op]:.1f}") for op, us in times.most_common()]
    page.table("collectives of a step", ("operation:", "calls", "µs a step", "µs a call"), lines)
    page.finish(record, args.out)
