"""Reports rendered from recorded runs: every figure from JSON, every section there, what is missing named."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded import kernel_records, write_h100

from minisgl.cli import main
from minisgl.profiling.compare import best_rows, compare, load_runs
from minisgl.profiling.expected import load_reference
from minisgl.profiling.record import Record
from minisgl.profiling.report import keep, write_reports
from minisgl.profiling.report.kernels import binding, classify
from minisgl.profiling.report.markdown import number, percent, size, spread, table
from minisgl.profiling.report.sources import gather
from minisgl.types import MinisglError

PAGES = ("INDEX.md", "final-report.md", "analysis.md", "environment.md", "kernel-dev-guide.md")
FINAL = (
    "Executive summary", "The way of one request", "Where a decode step's time goes", "Communication between ranks",
    "Timeline of a tensor-parallel step",
    "A served model under load", "Opportunities, by priority", "Rulings on claims", "Expected and measured",
    "Conclusions",
)  # fmt: skip

HEADING = {"request": FINAL[1], "step": FINAL[2], "load": FINAL[5]}
KEPT = Path(__file__).resolve().parents[2] / "reports" / "data"
LOAD = {"settings": {"model": "qwen3-0.6b", "num_requests": 64, "concurrency": 16, "input_len": [256, 512],
                     "output_len": 64}}  # fmt: skip


def make(kind: str, rows: list[dict[str, Any]], summary: dict[str, Any], device: str = "cuda") -> Record:
    index = kernel_records()[0]
    name = index.hardware["name"] if device == "cuda" else "a CPU, 2 cores"
    return replace(index, kind=kind, rows=rows, summary=summary, hardware={"name": name, "device": device})


def ruling(claim: str, verdict: str, gain: float, case: dict[str, int] | None = None) -> dict[str, Any]:
    row = {"claim": claim, "text": f"{claim} pays", "claimed": [0.05, None], "a": "old", "b": "new", "kernels": []}
    row |= {"gain": gain, "low": gain - 0.01, "high": gain + 0.01, "detectable": 0.02, "rounds": 15}
    us = {"median": 10.0, "p10": 9.9, "p90": 10.1}
    return row | {"case": case, "verdict": verdict} | ({"us_a": us, "us_b": us} if case else {})


def full_run(folder: Path) -> Path:
    """The recorded H100 kernels, and made-up records of the kinds that no GPU run has left yet."""
    write_h100(folder)
    spans = [("tokenize", 0.0, 900.0, "server"), ("qkv", 1000.0, 4321.0, "prefill"), ("o", 5400.0, 700.0, "decode")]
    rows = [
        {"span": s, "start_us": start, "us": us, "category": c, "layer": None, "window": "ttft"}
        for s, start, us, c in spans
    ]
    operators = {"ttft": {"tokenize": 0.9, "qkv": 4.321}, "itl": {"o": 0.7}}
    summary = {"ttft_ms": 5.4, "itl_ms": 0.7, "accounted": 0.97, "operators": operators, "prompt_tokens": 77}
    summary |= {"model": "qwen3-0.6b", "output_tokens": 9}
    make("request", rows, summary | {"ttft_sum_ms": 5.4, "itl_sum_ms": 0.7}).write(folder)
    step = [{"operator": "attention", "kernel": "decode_kernel", "calls": 28, "us": 300.5, "bytes": 10_000_000,
             "floor_us": 111.0, "limit": "HBM", "fraction": 0.37},
            {"operator": "lm_head", "kernel": "gemm", "calls": 1, "us": 99.5, "bytes": 300_000_000, "floor_us": 95.0,
             "limit": "compute", "fraction": 0.95},
            {"operator": "rmsnorm", "kernel": "norm", "calls": 1, "us": 0.5, "bytes": 4, "floor_us": 0.4,
             "limit": "launch", "fraction": 0.8}]  # fmt: skip
    facts = {"step_us": 450.5, "gaps_us": 50.0, "batch": 8, "context": 672, "model": "qwen3-0.6b"}
    make("step", step, facts).write(folder)
    comm = [{"op": "all_reduce", "path": path, "bytes": 4**n * 1024, "world": 2, "us": {"median": 10.0 * n + at},
             "algo_gbps": 1.0, "bus_gbps": 1.0}
            for at, path in enumerate(("gloo", "other")) for n in range(1, 5)]  # fmt: skip
    batches = [{"batch": 8, "bytes": 4096, "path": "gloo", "layer_us": 60.0, "token_us": 1680.0, "share": 0.5}]
    facts = {"batches": batches, "weights_us": 61.0, "layers": 28, "model": "qwen3-0.6b"}
    make("comm", comm, facts, device="cpu").write(folder)
    seen = {
        "kernel": "index_v2",
        "grid": "(64, 1, 1)",
        "block": "(128, 1, 1)",
        "us": 1.9,
        "dram_percent": 33.5,
        "dominant_stall": "long_scoreboard",
    }
    more = [
        seen | {"grid": "(4096, 1, 1)", "us": 22.5, "dram_percent": 61.5},
        {"of": "attention-decode", "kernel": "_decode", "us": 12.5},
        {"of": "rmsnorm", "kernel": "rmsnorm", "us": 2.5},
    ]
    make("ncu", [seen, *more], {}).write(folder)
    reduced = [{"op": "all_reduce", "start_us": 100.0 * i, "us": 40.0, "bytes": 4096} for i in range(1, 5)]
    shares = {"step_us": 640.0, "comm_us": 160.0, "share": 0.25, "calls": 4, "layers": 2, "world": 2, "device": "cpu"}
    make("tp", reduced, shares | {"model": "smollm2", "batch": 8, "context": 256}, device="cpu").write(folder)
    make("load", [{"what": "requests a second", "value": 12.5, "unit": "1/s"}], LOAD).write(folder)
    verdicts = [ruling("pdl", "confirmed", 0.2, {"tokens": 1}), ruling("pdl", "confirmed", 0.2)]
    verdicts += [ruling("hints", "no difference", 0.005), ruling("sort", "refuted", -0.3)]
    verdicts.append({"claim": "nccl", "text": "nccl pays", "case": None, "verdict": "not measurable here",
                     "why": "one GPU", "a": "x", "b": "y"})  # fmt: skip
    make("rulings", verdicts, {}).write(folder)
    compare({record.kind: record for record in kernel_records()}, load_reference()).write(folder)
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = full_run(tmp_path_factory.mktemp("run"))
    write_reports([run], run / "report")
    return run / "report"


def test_numbers_keep_three_digits_and_no_exponent() -> None:
    values = {
        0.0: "0",
        0.000123: "0.000123",
        0.5: "0.5",
        1.23456: "1.23",
        99.44: "99.4",
        151936.0: "151,936",
        12.0: "12",
    }
    assert {value: number(value) for value in values} == values
    assert (number(None), percent(0.123), percent(0.0123), size(2**21), size(300)) == (
        "–",
        "12%",
        "1.2%",
        "2 MiB",
        "300 B",
    )
    assert spread({"median": 2.0, "p10": 1.5, "p90": 3.0}) == "2 (1.5–3)"
    assert table(("a:", "b"), [("x|y", 1)]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_every_page_and_section_is_there(reports: Path) -> None:
    assert sorted(path.name for path in reports.iterdir()) == sorted([*PAGES, "plots", "report.html"])
    assert re.findall(r"^## (.*)", (reports / "final-report.md").read_text(), re.M) == list(FINAL)
    analysis = (reports / "analysis.md").read_text()
    for kernel in ("index", "store", "attention"):
        part = analysis.partition(f"\n## {kernel}\n")[2].partition("\n## ")[0]
        for word in ("Execution model", "Classification", "Which limit binds", "| floor µs |", "roofline-"):
            assert word in part, (kernel, word)


def test_figures_come_from_the_records(reports: Path) -> None:
    final, analysis = (reports / "final-report.md").read_text(), (reports / "analysis.md").read_text()
    (index, *_) = kernel_records()
    row = next(r for r in best_rows(index.rows) if r["case"]["tokens"] == 16384)
    assert f"| {spread(row['us'])} |" in analysis and f"{percent(row['fraction'])} of HBM" in analysis
    assert "first token after 5.4 ms" in final and "| qkv | 4.32 | 83% |" in final
    assert "450 µs a step, 50 of them in gaps" in final and "| attention | decode_kernel | 28 |" in final
    assert "attention (67%)" in final
    assert "qwen3-0.6b, batch 8, context 672" in final and "| 111 | HBM | 37% |" in final
    assert "HBM binds attention (67% of the step) and compute binds lm_head (22% of the step)." in final
    assert "**A request** to qwen3-0.6b of 77 tokens" in final and "qwen3-0.6b: 77 tokens in, 9 out" in final
    assert "qwen3-0.6b: 64 requests, 16 at once, 256–512 tokens in, 64 tokens out." in final
    assert "CPU, gloo between processes" in final
    assert "640 µs a step, of which 4 collectives take 160 µs (25%), 80 µs a layer" in final
    assert "| requests a second | 12.5 | 1/s |" in final
    assert "35 or 70 GB/s by how one counts" in final


def test_rulings_show_interval_and_detectable_effect(reports: Path) -> None:
    final = (reports / "final-report.md").read_text()
    assert "| pdl pays | **confirmed** | +20.0% (+19.0% to +21.0%) |" in final
    assert "+0.5% (-0.5% to +1.5%), detectable: 2.0%" in final
    assert "| nccl pays | **not measurable here** | – | – | one GPU |" in final


def collectives(world: int) -> Record:
    """All-reduces of 16 KiB and 64 MiB on `world` GPUs; the table chose one-shot for small ones, else NCCL."""
    times = {
        16384: {"direct": 12.0, "registered": 10.0, "registered_copy": 11.0, "one_shot": 5.0},
        67108864: {"direct": 200.0, "registered": 250.0},
    }
    rows = [{"op": "all_reduce", "path": path, "bytes": size, "world": world, "algo_gbps": 1.0, "bus_gbps": 1.0,
             "us": {"median": us, "p10": us * 0.99, "p90": us * 1.01}}
            for size, paths in times.items() for path, us in paths.items()]  # fmt: skip
    return make("comm", rows, {"world": world, "chosen": [[1048576, "one_shot"], [67108864, "direct"]]})


@pytest.mark.parametrize("world", [1, 2])
def test_claims_on_collectives_are_ruled_on_by_recorded_timings(tmp_path: Path, world: int) -> None:
    absent = {"case": None, "verdict": "not measurable here", "why": "one GPU", "a": "x", "b": "y", "text": "t"}
    rows = [{"claim": claim, **absent} for claim in ("adaptive-threshold", "registered-buffers", "nccl")]
    make("rulings", [*rows, ruling("pdl", "confirmed", 0.2)], {}).write(tmp_path)
    collectives(world).write(tmp_path)
    write_reports([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "final-report.md").read_text()
    if world == 1:
        assert "recorded timings" not in text and "1 confirmed" in text and "3 not measurable here" in text
        return
    assert "2 of them from recorded timings of the collectives, not interleaved." in text
    assert "| adaptive-threshold (recorded) | bytes 16384 | 11 (10.9–11.1) | 5 (4.95–5.05) | +120.0% " in text
    table = text.partition("## Rulings on claims")[2]
    pooled = next(line for line in table.splitlines() if line.startswith("| Registered buffers"))
    assert "| **refuted** | -2.0% (-4.0% to -0.0" in pooled and "confirmed at 16 KiB" in pooled
    assert "| t | **not measurable here** | – | – | one GPU |" in table and "1 not measurable here" in text
    open_ones, _, settled = text.partition("## Opportunities")[2].partition("Ruled on and settled")
    assert "measured paths instead of" in settled and "measured paths instead of" not in open_ones


def test_profiler_facts_stand_with_their_kernel(reports: Path) -> None:
    analysis = (reports / "analysis.md").read_text()
    index, store = (analysis.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in ("index", "store"))
    assert "| index_v2 (64 × 128) | 1.9 | 33.5 | long_scoreboard |" in index
    assert "| index_v2 (4096 × 128) | 22.5 | 61.5 | long_scoreboard |" in index
    assert "| _decode | 12.5 |" in analysis.partition("\n## attention\n")[2].partition("\n## ")[0]
    assert "| rmsnorm | 2.5 |" in analysis.partition("**rmsnorm.**")[2].partition("**rope.**")[0]
    (advice,) = [line for line in index.splitlines() if line.startswith("- under 50% of peak")]
    assert "coalescing" in advice and advice.endswith("(index_v2 (64 × 128))")  # not the launch that fills the GPU
    assert "`minisgl profile ncu --kernels store`" in store


def test_gains_that_are_settled_are_no_opportunities(tmp_path: Path) -> None:
    rows = [ruling("pdl-index", "confirmed", 0.2), ruling("own", "confirmed", 0.3)]
    make("rulings", rows, {}).write(tmp_path)
    write_reports([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "final-report.md").read_text().partition("## Opportunities")[2].partition("\n## ")[0]
    assert "ruling own" in text and "ruling pdl-index" not in text
    assert "+20.0% (+19.0% to +21.0%): the engine does it." in text


def test_rows_of_a_cache_say_nothing_of_memory(tmp_path: Path) -> None:
    (index, *_) = kernel_records()
    row = best_rows(index.rows)[-1]
    once = row | {"case": {"tokens": 16384, "width": 4096}, "limit": "HBM", "fraction": 0.95}
    again = once | {"case": {**once["case"], "distinct": 64}, "fraction": 2.05, "us": {"median": 1.5}}
    replace(index, rows=[once, again, once | {"version": "v1"}, again | {"version": "v1"}]).write(tmp_path)
    write_reports([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "analysis.md").read_text().partition("\n## index")[2].partition("\n## ")[0]
    assert "(95% of HBM at tokens 16384, width 4096)" in text and "205% of HBM (cached)" in text


def test_versions_stand_beside_the_best_of_their_sweep(tmp_path: Path) -> None:
    (index, *_) = kernel_records()
    first = best_rows(index.rows)[0] | {"version": "v2", "config": None, "dtype": "float16"}
    rows = []
    for tokens in (1, 64):
        row = first | {"case": {"tokens": tokens, "width": 4096}, "us": {"median": 8.5}}
        rows += [row, row | {"version": "v1", "us": {"median": 8.0}}]
        configs = ({"threads": 64, "work": 1, "pdl": True}, {"threads": 128, "work": 4, "pdl": True})
        rows += [row | {"config": c, "us": {"median": us}} for c, us in zip(configs, (9.0, 7.25), strict=True)]
        rows.append(row | {"case": {"tokens": tokens, "width": 4096, "distinct": 64}, "us": {"median": 1.5}})
        rows.append(row | {"config": configs[0], "dtype": "bfloat16", "us": {"median": 1.25}})
    replace(index, rows=rows).write(tmp_path)
    write_reports([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "analysis.md").read_text().partition("**Versions**")[2].partition("![")[0]
    assert "| v2 | 8.5 | 8.5 |" in text and "| v1 | 8 | 8 |" in text
    assert "| v2, best of the sweep | 7.25 | 7.25 |" in text and "1.25" not in text


def test_scatter_tells_what_was_measured(tmp_path: Path) -> None:
    (_, store, _) = kernel_records()
    costs = [{"version": "v2", "tokens": 64, "width": 1024, "percent": {"random": 1.4, "paged": 2.6}},
             {"version": "wide", "tokens": 64, "width": 1024, "percent": {"random": 9.0}},
             {"version": "v1", "tokens": 64, "width": 256, "percent": {}}]  # fmt: skip
    replace(store, summary={"scatter_percent": costs}).write(tmp_path)
    write_reports([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "analysis.md").read_text()
    assert "| v2 | 64 | 1024 | +1% | +3% |" in text and "nan" not in text and "| wide | 64 |" not in text


def test_one_rank_has_no_bandwidth(tmp_path: Path) -> None:
    rows = [{"op": "all_reduce", "path": path, "bytes": 1 << n, "world": 1, "us": {"median": us},
             "algo_gbps": 12345.0, "bus_gbps": 0.0}
            for n in range(10, 27) for path, us in (("direct", 0.411), ("two_shot", 3.25))]  # fmt: skip
    batches = [{"batch": 8, "bytes": 4096, "path": "direct", "layer_us": 0.6, "token_us": 17.0, "share": 0.5}]
    facts = {"batches": batches, "weights_us": 61.0, "layers": 28, "model": "qwen3-8b", "world": 1, "layer_us": 0.6}
    comm = make("comm", rows, facts)
    comm.write(tmp_path)
    write_reports([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "final-report.md").read_text()
    assert "nothing crosses a link" in text and "12,345" not in text and "µs a layer" not in text
    assert (
        "0.411" not in text
        and "| all_reduce | two_shot | 1 KiB | 1 | 3.25 |" in text
        and "12 other rows are in the JSON" in text
    )
    found = compare({"comm": comm}, load_reference())
    assert not any("tensor parallel" in row["what"] for row in found.rows)


def test_what_a_cpu_measured_is_marked_in_a_gpus_reports(tmp_path: Path) -> None:
    write_h100(tmp_path / "gpu")
    step = {"operator": "qkv", "kernel": "C++", "calls": 1, "us": 90.0, "bytes": 1, "floor_us": 9.0, "fraction": 0.1}
    make("step", [step], {"step_us": 100.0, "gaps_us": 10.0}, device="cpu").write(tmp_path / "cpu")
    empty = make("step", [], {})
    empty.skip("operators", "its kernels overlap")
    empty.write(tmp_path / "gpu")
    write_reports([tmp_path / "cpu", tmp_path / "gpu"], tmp_path / "report")
    text = (tmp_path / "report" / "final-report.md").read_text()
    assert "On a CPU instead, until a GPU has done it: step." in text
    part = text.partition("## Where a decode step's time goes")[2].partition("\n## ")[0]
    assert "**Measured on a CPU**" in part and f"Left out: {empty.hardware['name']}: its kernels overlap." in part
    assert "**A decode step** (on a CPU) spends most on qkv" in text and "of a decode step (on a CPU)" in text
    assert "| qkv (C++) |" not in text.partition("## Opportunities")[2].partition("\n## ")[0]
    assert "Not measured yet: comm, request, step" in text


def test_topology_is_shown_as_a_terminal_would(tmp_path: Path) -> None:
    (_, _, env) = kernel_records()
    replace(env, summary={"topology": "\x1b[4mGPU0\tGPU1\x1b[0m\nGPU0\t X \tNV18"}).write(tmp_path)
    write_reports([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "environment.md").read_text()
    assert "```\n\tGPU0\tGPU1\nGPU0\t X \tNV18\n```" in text and "\x1b" not in text


def test_opportunities_are_ranked_by_what_they_may_give(reports: Path) -> None:
    text = (reports / "final-report.md").read_text().partition("## Opportunities")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert ["attention" in lines[0], "gaps" in lines[1], "new instead of old" in lines[2]] == [True] * 3
    assert "up to 42% of a step" in lines[0]


def test_plots_are_well_formed_and_all_shown(reports: Path) -> None:
    shown = set()
    for page in PAGES:
        shown |= set(re.findall(r"!\[[^\]]+\]\(plots/([^)]+)\)", (reports / page).read_text()))
    assert shown == {path.name for path in (reports / "plots").iterdir()}
    wanted = "roofline.svg roofline-index.svg versions-store.svg step.svg request.svg comm-all_reduce.svg rulings.svg"
    assert set(wanted.split()) <= shown
    for path in (reports / "plots").iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_same_records_give_the_same_bytes(reports: Path, tmp_path: Path) -> None:
    write_reports([reports.parent], tmp_path)
    for path in reports.rglob("*.*"):
        assert (tmp_path / path.relative_to(reports)).read_bytes() == path.read_bytes(), path.name


def test_html_needs_nothing_else(reports: Path) -> None:
    text = (reports / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", text) and "<script" not in text and "@import" not in text
    anchors = set(re.findall(r'href="#([^"]+)"', text))
    assert anchors == set(re.findall(r'<section id="([^"]+)"', text))
    for title in FINAL:
        assert f"<h2>{title}</h2>" in text


@pytest.mark.parametrize("data", sorted(KEPT.iterdir()), ids=lambda data: data.name)
def test_committed_records_render(data: Path, tmp_path: Path) -> None:
    write_reports([data], tmp_path)
    kinds = load_runs(data)
    final, index = ((tmp_path / name).read_text() for name in ("final-report.md", "INDEX.md"))
    assert tuple(re.findall(r"^## (.*)", final, re.M)) == FINAL
    assert all(f"| {kind} | {len(record.rows)} rows" in index for kind, record in kinds.items())
    for kind in {"request", "step", "load"} & {kind for kind, record in kinds.items() if record.rows}:
        facts = kinds[kind].summary
        part = final.partition(f"## {HEADING[kind]}")[2].partition("\n## ")[0]
        assert (facts.get("settings") or facts)["model"] in part, kind
    for page in PAGES[:-1]:  # not the guide, which has no figures
        text = (tmp_path / page).read_text()
        assert "None" not in text and "nan" not in re.findall(r"\w+", text), page


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    kernel_records()[2].write(tmp_path)  # the environment alone
    write_reports([tmp_path], tmp_path / "report")
    final, analysis = ((tmp_path / "report" / name).read_text() for name in ("final-report.md", "analysis.md"))
    for kind in ("request", "step", "comm", "tp", "load", "rulings", "compare"):
        assert f"`minisgl profile {kind}" in final, kind
    for kind in ("kernels", "index", "store", "attention"):
        assert f"`minisgl profile {kind}`" in analysis, kind
    assert re.findall(r"^## (.*)", final, re.M) == list(FINAL)


def test_full_gpu_runs_are_preferred(tmp_path: Path) -> None:
    gpu = kernel_records()[0]
    cpu = replace(gpu, hardware={"name": "a CPU", "device": "cpu"}, time="2030-01-01T00:00:00+00:00")
    quick = replace(gpu, quick=True, time="2030-01-01T00:00:00+00:00")
    for name, record in (("gpu", gpu), ("cpu", cpu), ("quick", quick)):
        record.write(tmp_path / name)
    found = gather(sorted(tmp_path.iterdir())).records["index"]
    assert (found.hardware["device"], found.quick) == ("cuda", False)


def test_records_are_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = full_run(tmp_path / "run")
    assert keep(run, tmp_path / "data").name.startswith("nvidia-h100")
    monkeypatch.chdir(tmp_path)
    assert not main(["profile", "report", "--out", str(run), "--write-reports"])
    assert (tmp_path / "reports" / "INDEX.md").exists()
    assert list((tmp_path / "reports" / "data").glob("nvidia-h100*/index.json"))
    with pytest.raises(MinisglError, match="no record"):
        write_reports([tmp_path / "nowhere"], tmp_path / "r")


@pytest.mark.parametrize(
    "limits, told",
    [
        (["launch"] * 3, "Launch-bound at every size"),
        (["launch", "HBM", "HBM"], "Bandwidth-bound, near its limit"),
        (["compute"] * 3, "Compute-bound"),
    ],
)
def test_class_follows_from_the_limits(limits: list[str], told: str) -> None:
    rows = [{"limit": x, "fraction": 0.9, "bytes": 10**i, "case": {"tokens": i}} for i, x in enumerate(limits, start=3)]
    assert classify(rows).startswith(told)
    assert limits[0] in binding(rows)
