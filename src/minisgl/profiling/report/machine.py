"""`environment.md`: the machines, their ceilings, and the versions that the figures depend on."""

from __future__ import annotations

import re
from typing import Any

from minisgl.profiling.record import Record
from minisgl.profiling.report.markdown import missing, number, origin, section, size, skipped, table
from minisgl.profiling.report.sources import Sources, command

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # what makes a terminal underline
UNITS = {"us": "µs", "gbps": "GB/s", "tflops": "TFLOP/s"}


def render(sources: Sources) -> str:
    """The whole page."""
    record = sources.get("env")
    parts = [missing("this machine and its ceilings", command("env"))] if record is None else _machine(record)
    return section("The machine", *parts, _records(sources), level=1)


def _machine(record: Record) -> list[str]:
    ceilings = [(name.rpartition("_")[0].replace("_", " "), number(value), UNITS.get(name.rpartition("_")[2], ""))
                for name, value in record.ceilings.items()]  # fmt: skip
    parts = [origin(record), section("Ceilings, as measured", table(("ceiling:", "measured", "unit:"), ceilings))]
    matrix = record.summary.get("peer_gbps")
    if matrix:
        head = ("from:", *(f"to {i}" for i in range(len(matrix))))
        lines = [(f"GPU {i}", *(number(x) for x in line)) for i, line in enumerate(matrix)]
        parts.append(section("GB/s between GPUs", table(head, lines)))
    facts = {**record.hardware, **record.summary}
    facts.pop("peer_gbps", None)
    topology = _ESCAPES.sub("", facts.pop("topology", None) or "").rstrip()
    found = dict(_flat(facts)) | {f"package {name}": value for name, value in record.versions.items()}
    parts.append(section("Facts", table(("fact:", "value:"), list(found.items()))))
    if topology:
        topology = topology if topology[0].isspace() else f"\t{topology}"  # above the column of names
        parts.append(section("Topology", "As `nvidia-smi topo -m` shows the host:", f"```\n{topology}\n```"))
    return [*parts, skipped(record)]


def _flat(facts: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        label = f"{above}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += _flat(value, f"{label} ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [line for i, each in enumerate(value) for line in _flat(each, f"{label} {i} ")]
        elif value is None or value == []:
            lines.append((label, "none"))
        elif name.endswith("_bytes"):
            lines.append((label.removesuffix(" bytes"), size(value)))
        else:
            lines.append((label, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return lines


def _records(sources: Sources) -> str:
    """What the reports rest on."""
    lines = [
        (kind, r.hardware["name"], f"`{r.commit}`", r.time[:16].replace("T", " "), "quick" if r.quick else "full",
         len(r.rows))
        for kind, r in sources.records.items()
    ]  # fmt: skip
    head = ("record:", "machine:", "commit:", "time (UTC):", "run:", "rows")
    return section("What the reports are rendered from", table(head, lines))
