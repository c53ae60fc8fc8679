"""`minisgl profile env`: the machine, and the ceilings that it was measured to have."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from minisgl.cli.lab import page

HELP = "show this machine, and measure its ceilings: bandwidths, launch latency, matrix rate"
UNITS = {"us": "µs", "gbps": "GB/s", "tflops": "TFLOP/s"}


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the facts and the ceilings; writes env.json."""
    from minisgl.profiling.ceilings import cpu_ceilings, gpu_ceilings, host_transfers, peer_transfers
    from minisgl.profiling.machine import environment
    from minisgl.profiling.record import new_record

    record, facts = new_record("env", args.quick), environment()
    page.table("this machine", ("fact:", "value:"), _flat(facts | {"versions": record.versions}))
    on_gpu = record.hardware["cuda"] is not None
    found = cpu_ceilings(args.quick)
    if on_gpu:
        found |= gpu_ceilings(args.quick) | host_transfers()
        facts["peer_gbps"] = peer_transfers()
    else:
        record.skip("the GPU's ceilings", record.hardware["no_cuda_reason"])
    if on_gpu and "launch_us" not in found:
        record.skip("launch latency", "the empty kernel needs NVRTC: pip install 'minisgl[cuda]'")
    if not facts.get("peer_gbps"):
        record.skip("bandwidth between GPUs", "fewer than two GPUs")
    rows = [{"ceiling": name, "value": value} for name, value in found.items()]
    page.table("ceilings", ("ceiling:", "measured", "unit:"), (_ceiling(*item) for item in found.items()))
    page.table("where one limit gives way to the next", ("from:", "to:", "at", "unit:"), turns(found))
    if facts.get("peer_gbps"):
        matrix = facts["peer_gbps"]
        heads = ("from:", *(f"to {i}" for i in range(len(matrix))))
        page.table("GB/s between GPUs", heads, ((i, *(_round(x) for x in line)) for i, line in enumerate(matrix)))
    page.finish(replace(record, ceilings=found, rows=rows, summary=facts), args.out)


def turns(ceilings: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """The bytes at which a launch stops to bind, and the operations a byte from which on computing does."""
    from minisgl.profiling.roofline import crossover_bytes, ridge

    on_gpu = "hbm_gbps" in ceilings
    launch = ceilings.get("launch_pdl_us") if on_gpu else ceilings["call_us"]
    gbps, rate = (ceilings["hbm_gbps"], "bf16_tflops") if on_gpu else (ceilings["cpu_gbps"], "cpu_tflops")
    lines = [("memory", "computing", f"{ridge(ceilings[rate], gbps):.0f}", "operations a byte")]
    if launch is not None:
        lines.insert(0, ("launch", "memory", f"{crossover_bytes(launch, gbps) / 1e3:.0f}", "kB"))
    return lines


def _flat(facts: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{above}{name} ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, each in enumerate(value):
                lines += _flat(each, f"{above}{name} {i} ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append((above + name, "not found" if shown is None else str(shown)))
    return lines


def _ceiling(ceiling: str, value: float) -> tuple[str, str, str]:
    name, _, unit = ceiling.rpartition("_")
    return name, f"{value:.4g}", UNITS[unit]


def _round(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"
