"""Which records a report is made from: for each kind, the best that the given folders hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minisgl.profiling.compare import load_runs
from minisgl.profiling.record import Record

KINDS = (
    "env",
    "kernels",
    "index",
    "store",
    "attention",
    "comm",
    "tp",
    "request",
    "step",
    "ncu",
    "load",
    "rulings",
    "compare",
)
SCRIPTS = {
    "env": "scripts/00_check_env.py", "kernels": "scripts/01_test_kernels.py", "index": "scripts/02_profile_index.py",
    "store": "scripts/03_profile_store.py", "attention": "scripts/04_profile_attention.py",
    "comm": "scripts/05_profile_comm.py",
}  # fmt: skip


@dataclass
class Sources:
    """The records of a report, and the plots that its pages have asked for, by file name."""

    records: dict[str, Record]
    reasons: dict[str, list[str]] = field(default_factory=dict)  # of records without rows: why
    plots: dict[str, str] = field(default_factory=dict)

    def stands_in(self, record: Record) -> bool:
        """Whether a record is a CPU's, in reports of a GPU."""
        machine = self.records.get("env")
        on_gpu = machine is not None and machine.hardware.get("device") == "cuda"
        return on_gpu and record.hardware.get("device") == "cpu"

    def mark(self, kind: str) -> str:
        """Behind a statement that a CPU's figures make, in reports of a GPU."""
        record = self.records.get(kind)
        return " (on a CPU)" if record is not None and self.stands_in(record) else ""

    def get(self, kind: str) -> Record | None:
        return self.records.get(kind)

    def plot(self, name: str, svg: str, alt: str) -> str:
        """Keeps the plot and returns the Markdown that shows it."""
        self.plots[f"{name}.svg"] = svg
        return f"![{alt}](plots/{name}.svg)"


def gather(folders: Sequence[Path]) -> Sources:
    """For each kind the best: with rows, no quick run, of a GPU; among those the newest."""
    best: dict[str, Record] = {}
    reasons: dict[str, list[str]] = {}
    for folder in folders:
        for kind, record in load_runs(folder).items():
            if not record.rows:
                name = record.hardware["name"]
                reasons.setdefault(kind, []).extend(f"{name}: {note['why']}" for note in record.skipped)
            if kind not in best or _rank(record) > _rank(best[kind]):
                best[kind] = record
    return Sources(best, reasons)


def _rank(record: Record) -> tuple[bool, bool, bool, str]:
    return bool(record.rows), not record.quick, record.hardware.get("device") == "cuda", record.time


def command(kind: str) -> str:
    """What measures a kind."""
    return f"minisgl profile {kind}"


def slug(record: Record) -> str:
    """The machine's name for a folder: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", str(record.hardware["name"]).lower()).strip("-")
