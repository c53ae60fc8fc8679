"""Records of real runs on an H100, from the lines that the benchmarks left, in the laboratory's format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisgl.profiling.record import Record

QWEN3 = {"heads": 16, "kv_heads": 8, "head_dim": 128}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def _first_line(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / file).read_text().splitlines()[0])
    return found


def kernel_records() -> list[Record]:
    """index.json and store.json from kernels.jsonl: time, commit, versions and figures as they are there."""
    line = _first_line("kernels.jsonl")
    hardware = {"name": line["hardware"], "device": "cuda", "cuda": {"name": line["hardware"]}}
    common = Record("", line["time"], line["commit"], False, hardware, line["versions"], line["ceilings"])
    rows = [_row(row, line["ceilings"]) for row in line["rows"]]
    return [
        replace(common, kind="index", rows=[row for row in rows if row["kernel"] == "index"]),
        replace(common, kind="store", rows=[row for row in rows if row["kernel"] == "store"]),
        replace(common, kind="env", rows=[{"ceiling": k, "value": v} for k, v in line["ceilings"].items()]),
    ]


def _row(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    us = row["us"]
    extra = {"bytes": round(row["gbps"] * us["median"] * 1e3), "flops": 0, "floor_us": row["fraction"] * us["median"]}
    config = {"pdl": False} if row["version"].endswith("no pdl") else None
    return {**{k: v for k, v in row.items() if k != "shape"}, "case": row["shape"], "config": config} | extra


def attention_record() -> Record:
    """attention.json from attention.jsonl; operations weren't recorded there."""
    line = _first_line("attention.jsonl")
    hardware = {"name": line["hardware"], "device": "cuda", "cuda": {"name": line["hardware"]}}
    gbps = line["bandwidth"] / 1e9
    rows = []
    for row in line["rows"]:
        phase, batch, _, context = row["work"].split()[:4]
        if phase == "decode" and context.isdigit():
            us = {name: row[f"{name}_us"] for name in ("median", "p10", "p90")}
            moved = round(row["tbps"] * us["median"] * 1e6)
            case = {
                "batch": int(batch),
                "tokens": 1,
                "context": int(context),
                "heads": 16,
                "kv_heads": 8,
                "head_dim": 128,
            }
            rows.append({
                "kernel": "attention", "version": row["implementation"], "phase": phase,
                "case": case, "dtype": "bfloat16", "config": None, "us": us, "bytes": moved, "flops": 4 * moved,
                "gbps": row["tbps"] * 1e3, "floor_us": moved / gbps / 1e3, "limit": "HBM", "fraction": row["fraction"],
            })  # fmt: skip
    return Record(
        "attention", line["time"], line["commit"], False, hardware, line["versions"], {"hbm_gbps": gbps}, rows=rows
    )


def write_h100(folder: Path) -> Path:
    """All of them into `folder`."""
    for record in [*kernel_records(), attention_record()]:
        record.write(folder)
    return folder
