"""What Nsight Compute measured: its CSV (`--csv --page raw`) as one row a kernel, and what the figures advise.

The raw page is wide: a header that begins with "ID", a row of units, then a row for each launch, a column a metric.
Metrics are described in NVIDIA's Nsight Compute profiling guide.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisgl.types import MinisglError

BRIEF = ("MemoryWorkloadAnalysis", "WarpStateStats")  # with `REQUESTED`, all that `parse` reads; fewer passes
SECTIONS = ("MemoryWorkloadAnalysis", "SpeedOfLight", "WarpStateStats", "LaunchStats", "Occupancy")
# Metrics by our names; where there are several, the first that is there counts.
_METRICS: dict[str, tuple[str, ...]] = {
    "us": ("gpu__time_duration.sum",),
    "dram_percent": (
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "sm_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct",),
    "l1_hit_percent": ("l1tex__t_sector_hit_rate.pct",),
    "sectors_per_load": ("l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",),
    "sectors_per_store": ("l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
_SPILLS = ("l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum", "l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum")
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_MICROSECONDS |= {f"{unit[:-1]}second": value for unit, value in _MICROSECONDS.items()}  # as older versions write

NEAR_PEAK = 70.0  # percent of peak bandwidth
FAR_FROM_PEAK = 50.0
MANY_BARRIERS = 0.2  # of the warps' stalls: ours, where the rule says "high"

REQUESTED = tuple(dict.fromkeys([*(names[0] for names in _METRICS.values()), *_SPILLS]))


@dataclass(frozen=True, slots=True)
class Rule:
    """Advice for the rows whose figure is above `above` and below `below`; a row may come under several rules."""

    when: str
    advice: str
    figure: str
    above: float = -math.inf
    below: float = math.inf

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether it is for this row; never where the figure wasn't measured."""
        value = row.get(self.figure)
        return value is not None and self.above < value < self.below


RULES = (
    Rule(
        f"over {NEAR_PEAK:.0f}% of peak bandwidth", "near the optimum: minor tuning is left",
        "dram_percent", above=NEAR_PEAK,
    ),
    Rule(
        f"under {FAR_FROM_PEAK:.0f}% of peak bandwidth",
        "check coalescing: 16 bytes a thread make 16 sectors a request, more bytes moved than asked for make more; "
        "and whether the launch binds at this size",
        "dram_percent", below=FAR_FROM_PEAK,
    ),
    Rule(
        f"over {MANY_BARRIERS:.0%} of stalls at barriers",
        "consider asynchronous copies, so that fewer threads wait for each other",
        "barrier_share", above=MANY_BARRIERS,
    ),
    Rule("spills to local memory", "reduce registers", "spill_sectors", above=0),
)  # fmt: skip


def label(row: Mapping[str, Any]) -> str:
    """A row's kernel and its launch's shape, which tells the sizes of one kernel apart: 'index_v2 (64 × 128)'."""
    grid, block = (_extent(str(row.get(name, ""))) for name in ("grid", "block"))
    return f"{row['kernel']} ({grid} × {block})" if grid and block else str(row["kernel"])


def _extent(dim: str) -> str:
    """'(8, 32, 1)' as '8·32'."""
    sizes = re.findall(r"\d+", dim)
    while len(sizes) > 1 and sizes[-1] == "1":
        sizes.pop()
    return "·".join(sizes)


def parse(text: str) -> list[dict[str, Any]]:
    """One row a kernel and launch shape, the medians of its launches; figures that weren't measured are None.

    Args:
        text: of `ncu --csv --page raw`, lines of the tool and of the program around it included.

    Raises:
        MinisglError: there is no such table in it, with what the tool said instead.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise MinisglError(f"Nsight Compute measured no kernel: {_errors(lines)}")
    table = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    header, units, launches = table[0], table[1], table[2:]
    if "Metric Name" in header:
        raise MinisglError("the table is of another page; run ncu with --csv --page raw")
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for cells in launches:
        facts = dict(zip(header, cells, strict=False))
        key = facts["Kernel Name"], facts.get("Grid Size", ""), facts.get("Block Size", "")
        groups.setdefault(key, []).append(_figures(header, units, cells))
    return [_row(*key, found) for key, found in groups.items()]


def _errors(lines: Sequence[str]) -> str:
    """What the tool said, and what to do about the most frequent reason."""
    said = [line for line in lines if line.startswith(("==ERROR==", "==WARNING=="))] or lines[-3:]
    text = " ".join(line.strip() for line in said) or "it said nothing"
    if "ERR_NVGPUCTRPERM" in text:
        text += " (only an administrator may read the counters: run it as root, or lift the driver's restriction)"
    return text


def _figures(header: Sequence[str], units: Sequence[str], cells: Sequence[str]) -> dict[str, float]:
    """Numbers of one launch by metric; times in microseconds."""
    found: dict[str, float] = {}
    for name, unit, cell in zip(header, units, cells, strict=False):
        try:
            value = float(cell.replace(",", ""))
        except ValueError:  # text, or "n/a"
            continue
        found[name] = value * _MICROSECONDS.get(unit, 1.0) if name == _METRICS["us"][0] else value
    return found


def _row(kernel: str, grid: str, block: str, launches: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    def median(*names: str) -> float | None:
        for name in names:
            values = [launch[name] for launch in launches if name in launch]
            if values:
                return statistics.median(values)
        return None

    row: dict[str, Any] = {"kernel": kernel, "grid": grid, "block": block, "launches": len(launches)}
    row |= {name: median(*metrics) for name, metrics in _METRICS.items()}
    spills = [value for name in _SPILLS if (value := median(name)) is not None]
    row["spill_sectors"] = sum(spills) if spills else None
    stalls = {
        found[1]: value
        for name in launches[0]
        if (found := _STALL.fullmatch(name)) and found[1] != "selected" and (value := median(name)) is not None
    }
    total = sum(stalls.values())
    row["dominant_stall"] = max(stalls, key=stalls.__getitem__) if total else None
    row["barrier_share"] = stalls.get("barrier", 0.0) / total if total else None
    return row
