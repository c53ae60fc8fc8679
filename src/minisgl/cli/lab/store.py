"""`minisgl profile store`: keys and values into cache slots, over tokens, widths and orders of slots."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from minisgl.cli.lab import page

HELP = "measure the KV store: every version and configuration, and what scattered slots cost"


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Prints a row a case and version, and the cost of scatter; writes store.json."""
    from minisgl.kernels.spec import registry
    from minisgl.kernels.store.cases import ORDERS
    from minisgl.profiling.ceilings import measure_ceilings
    from minisgl.profiling.record import new_record
    from minisgl.profiling.scatter import launch_ends, scatter_cost, store_jobs, sweep

    record = new_record("store", args.quick)
    jobs = store_jobs(record.hardware["device"], args.quick)
    record = replace(record, ceilings=measure_ceilings(args.quick))
    with page.progress("store", len(jobs)) as advance:
        rows = sweep(registry()["store"], jobs, record, lambda *_: [], advance)
    for row in rows:
        row["order"] = ORDERS[row["case"]["order"]]
    page.ceilings(record)
    columns = ("tokens", "width", "slots:", "version:", "configuration:", "µs (p10–p90)", "GB/s", "floor µs", "of")
    page.table("store: K and V rows into their slots", columns, (_line(row) for row in rows))
    costs = scatter_cost(rows)
    heads = ("version:", "tokens", "width", *(name for name in ORDERS if name != "sequential"))
    page.table("slower than sequential slots", heads, (_cost(cost) for cost in costs))
    summary = {"launch_ends": launch_ends(rows), "scatter_percent": costs}
    page.finish(replace(record, rows=rows, summary=summary), args.out)


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    case = row["case"]
    about = (case["tokens"], case["heads"] * case["head_dim"], row["order"], row["version"], page.config(row))
    return (*about, page.us(row), f"{row['gbps']:.1f}", f"{row['floor_us']:.2f}", page.of_limit(row))


def _cost(cost: dict[str, Any]) -> tuple[object, ...]:
    return (cost["version"], cost["tokens"], cost["width"], *(f"{value:+.0f}%" for value in cost["percent"].values()))
