"""Reference figures: what can't be true in them, how a run differs from them, and what got slower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minisgl.cli import main
from minisgl.profiling.compare import _row_of, compare, load_runs
from minisgl.profiling.expected import Figure, Reference, Sum, load_reference, references
from minisgl.profiling.plausibility import Finding, check_reference, computed_gbps
from minisgl.profiling.record import Record, new_record, read
from minisgl.types import MinisglError

A100 = load_reference("a100")


def record(rows: list[dict[str, Any]], kind: str = "index", **more: Any) -> Record:
    hardware = {"name": "a GPU", "device": "cuda"}
    return Record(kind, "2026-01-01T00:00:00+00:00", "abc", False, hardware, {}, rows=rows, **more)


def index_row(us: float, version: str = "v2", **more: Any) -> dict[str, Any]:
    row = {"kernel": "index", "version": version, "case": {"tokens": 64, "width": 4096, "vocab": 1000}, "config": None}
    row |= {"dtype": "float16", "us": {"median": us, "p10": us * 0.99, "p90": us * 1.01}, "bytes": 1_048_832}
    return row | {"floor_us": 0.5, "limit": "launch", "fraction": 0.5 / us, "gbps": 1.0} | more


def by_severity(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.figure, finding.severity) for finding in findings}


def test_reference_that_cannot_be_is_flagged() -> None:
    findings = check_reference(A100)
    assert by_severity(findings) == {
        ("index", "inconsistent"),  # 100 GB/s isn't 70% of 2 TB/s
        ("store", "inconsistent"),
        ("store", "ambiguous"),  # 512 KiB in 15 µs
        ("all-reduce", "impossible"),  # more than one direction of the link
        ("all-reduce-copy", "impossible"),  # 4.2 TB/s
    }
    text = {(finding.figure, finding.severity): finding.text for finding in findings}
    assert "launch binds" in text["index", "inconsistent"]
    assert "35 or 70 GB/s" in text["store", "ambiguous"]
    assert "336–419 GB/s, and 300 is the most" in text["all-reduce", "impossible"]
    assert "4,194 GB/s" in text["all-reduce-copy", "impossible"]


def figure(**more: Any) -> Figure:
    return Figure(id="x", what="x", kind="index", ceiling="hbm_gbps", **more)


@pytest.mark.parametrize(
    "made, severity",
    [
        (figure(us=(10, 10), bytes=10_000_000, gbps=(1000, 1000), fraction=(0.5, 0.5)), None),
        (figure(us=(10, 10), bytes=10_000_000, fraction=(0.45, 0.55)), None),
        (figure(us=(4, 5), bytes=10_000_000), None),  # exactly the ceiling at the upper end
        (figure(us=(4, 4), bytes=10_000_000), "impossible"),
        (figure(us=(10, 10), bytes=10_000_000, fraction=(0.9, 0.9)), "inconsistent"),
        (figure(gbps=(500, 500), fraction=(0.9, 0.9)), "inconsistent"),
        (figure(us=(10, 10), bytes=10_000_000, gbps=(500, 500)), "ambiguous"),
        (figure(us=(10, 10), bytes=10_000_000, gbps=(300, 300)), "inconsistent"),
        (figure(us=(0, 1), bytes=10_000_000, gbps=(300, 300)), None),  # only a bound
    ],
)
def test_plausibility_is_arithmetic_on_any_figure(made: Figure, severity: str | None) -> None:
    reference = Reference("r", "s", {"hbm_gbps": 2000.0}, [made])
    assert [finding.severity for finding in check_reference(reference)] == ([severity] if severity else [])


def test_parts_that_exceed_their_whole_are_flagged() -> None:
    figures = [figure(us=(10, 10)), Figure("part", "part", "index", us=(4, 4))]
    for times, flagged in ((2, False), (3, True)):
        reference = Reference("r", "s", {"hbm_gbps": 2000.0}, figures, [Sum("x", {"part": times})])
        assert bool(check_reference(reference)) == flagged


def test_reference_is_data_with_a_source() -> None:
    assert "a100" in references() and "claims" not in references()
    assert "A100" in A100.source
    assert computed_gbps(A100.figure("index")) == pytest.approx((104.9, 104.9), rel=1e-3)
    for total in A100.sums:
        assert {total.whole, *total.parts} <= {figure.id for figure in A100.figures}
    with pytest.raises(MinisglError, match="a100"):
        load_reference("b200")


def test_discrepancy_with_the_reference_names_cause_and_experiment() -> None:
    found = compare({"index": record([index_row(2.0), index_row(1.9, "v1"), index_row(0.1, "copy")])}, A100)
    (row,) = [row for row in found.rows if row["against"] == "reference"]
    assert (row["measured_us"], row["expected_us"]) == (1.9, 10)
    assert "can't be right" in row["cause"] and row["next"]
    assert {
        "what": "all-reduce of 8 MiB on 2 GPUs over NVLink (bytes that each sends)",
        "why": "not measured in these runs",
    } in found.skipped


def test_what_agrees_is_no_discrepancy() -> None:
    assert compare({"index": record([index_row(10.2)])}, A100).rows == []


def test_kernel_far_from_its_floor_is_listed_and_ranked() -> None:
    slow = index_row(100.0, floor_us=20.0, limit="HBM", fraction=0.2, case={"tokens": 4096, "width": 4096})
    near = index_row(25.0, floor_us=20.0, limit="HBM", fraction=0.8, case={"tokens": 8192, "width": 4096})
    found = compare({"index": record([index_row(2.0), near, slow])}, A100)
    assert [row["against"] for row in found.rows] == ["reference", "floor"]
    assert found.rows[1]["ratio"] == pytest.approx(5.0) and "tokens 4096" in found.rows[1]["what"]
    sizes = [max(row["ratio"], 1 / row["ratio"]) for row in found.rows]
    assert sizes == sorted(sizes, reverse=True)


def test_regression_is_flagged_beyond_both_spreads() -> None:
    before = record([index_row(10.0), index_row(10.0, "v1"), index_row(10.0, "v3")])
    now = record([index_row(12.0), index_row(10.3, "v1"), index_row(9.0, "v3")])
    (row,) = [row for row in compare({"index": now}, A100, {"index": before}).rows if row["against"] == "earlier run"]
    assert row["ratio"] == pytest.approx(1.2) and "v2" in row["what"]

    noisy = replace(now, rows=[index_row(12.0) | {"us": {"median": 12.0, "p10": 9.0, "p90": 15.0}}])
    assert compare({"index": noisy}, A100, {"index": before}).summary["regressions"] == 0
    elsewhere = replace(before, hardware={"name": "another GPU", "device": "cuda"})
    assert compare({"index": now}, A100, {"index": elsewhere}).summary["regressions"] == 0


def test_command_compares_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    record([index_row(10.0)]).write(before)
    record([index_row(13.0)]).write(now)
    (now / "trace.json").write_text("[]")
    args = ["profile", "compare", "--out", str(now), "--earlier", str(before)]
    assert not main(args)
    assert "1.30× index: index, v2" in capsys.readouterr().out
    assert set(load_runs(now)) == {"index", "compare"}
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--fail"])
    assert stopped.value.code == 1
    assert main(["profile", "compare", "--out", str(tmp_path / "nowhere")]) != 0
    assert "holds no records" in capsys.readouterr().err


def test_claims_and_references_survive_a_round_trip() -> None:
    assert msgspec.json.decode(msgspec.json.encode(A100), type=Reference) == A100


def test_every_reference_figure_is_found_in_the_records_of_a_gpu() -> None:
    """A figure that matches nothing reads as if nobody had measured it."""
    folder = Path(__file__).parents[2] / "reports" / "data" / "nvidia-h100-80gb-hbm3"
    runs = {record.kind: record for record in map(read, sorted(folder.glob("*.json")))}
    assert not {f.id for f in load_reference().figures if f.us is not None and _row_of(f, runs) is None}


def test_a_reference_may_match_any_of_several_paths() -> None:
    """An all-reduce with its copies is the fastest of the paths that copy, as one without is of those that don't."""
    of = {"op": "all_reduce", "bytes": 8 << 20, "world": 2}
    rows = [
        of | {"path": path, "us": us} for path, us in [("registered_copy", 60), ("two_shot_copy", 45), ("two_shot", 35)]
    ]
    found = _row_of(A100.figure("all-reduce-total"), {"comm": record(rows, "comm")})
    assert found and found[0] == 45


def test_pieces_of_a_request_count_together() -> None:
    """Overlap cuts an operator into pieces: the shortest of them says nothing."""
    pieces = [
        ("qkv", 0, 4.0),
        ("qkv", 0, 2.0),
        ("qkv", 1, 7.0),
        ("qkv", 2, 5.0),
        ("sample", None, 1.0),
        ("sample", None, 30.0),
    ]
    norms = [("rmsnorm", None, us) for us in (3.0, 2.0, 4.0)]
    rows = [
        {"span": span, "layer": layer, "us": us, "window": "ttft", "category": "kernel"}
        for span, layer, us in pieces + norms
    ]
    runs = {"request": replace(new_record("request", True), rows=rows)}
    figures = {f.id: f for f in load_reference().figures}

    def found(name: str) -> float | None:
        row = _row_of(figures[f"request.{name}"], runs)
        return row and row[0]

    assert [found(name) for name in ("qkv", "sampling", "rmsnorm", "layer", "head")] == [6.0, 31.0, 3.0, 6.0, None]
