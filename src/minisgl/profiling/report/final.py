"""`final-report.md`: what binds each kernel, what optimizations gave, where a request and a step spend their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from minisgl.profiling.compare import best_rows, case_text
from minisgl.profiling.record import Record
from minisgl.profiling.report import plots
from minisgl.profiling.report.kernels import SWEEPS, classify
from minisgl.profiling.report.markdown import (
    lookup,
    missing,
    number,
    origin,
    percent,
    section,
    size,
    skipped,
    spread,
    table,
    words,
)
from minisgl.profiling.report.sources import Sources, command
from minisgl.profiling.rulings import measured

MOST_ROWS = 20  # of a ranked list


def render(sources: Sources) -> str:
    """The whole page."""
    parts = [_summary(sources), _request(sources), _step(sources), _communication(sources), _tp_timeline(sources)]
    parts += [
        _load(sources),
        _opportunities(sources),
        _rulings(sources),
        _discrepancies(sources),
        _conclusions(sources),
    ]
    return section("Final report", *parts, level=1)


def _classes(sources: Sources) -> list[tuple[str, str]]:
    """Each kernel measured and its class."""
    found = []
    for kind in SWEEPS:
        rows = best_rows(record.rows) if (record := sources.get(kind)) else []
        for name in dict.fromkeys(row["kernel"] for row in rows):
            found.append((name, classify([row for row in rows if row["kernel"] == name])))
    return found


def _verdicts(record: Record | None) -> Counter[str]:
    return Counter(row["verdict"] for row in record.rows if row["case"] is None) if record else Counter()


# -- executive summary -----------------------------------------------------------------------------------------------


def _summary(sources: Sources) -> str:
    machines = list(dict.fromkeys(r.hardware["name"] for r in sources.records.values()))
    points = [f"Measured on {words(machines)}." if machines else "Nothing has been measured yet."]
    points += [f"**{name}**: {text}" for name, text in _classes(sources)]
    if step := _top_operators(sources.get("step")):
        points.append(f"**A decode step** spends most on {step}.")
    request = sources.get("request")
    if request and lookup(request, "ttft_ms"):
        points.append(
            f"**A request** of {lookup(request, 'prompt_tokens')} tokens has its first token after "
            f"{number(lookup(request, 'ttft_ms'))} ms and one every {number(lookup(request, 'itl_ms'))} ms; "
            f"{percent(lookup(request, 'accounted'))} of that time is accounted for by operators."
        )
    verdicts = _verdicts(sources.get("rulings"))
    if verdicts:
        told = words([f"{count} {verdict}" for verdict, count in verdicts.most_common()])
        points.append(f"**Claims**: {told}.")
    return section("Executive summary", "\n".join(f"- {point}" for point in points))


def _top_operators(record: Record | None) -> str:
    if record is None or not record.rows:
        return ""
    merged: Counter[str] = Counter()
    for row in record.rows:
        merged[row["operator"]] += row["us"]
    whole = lookup(record, "step_us") or sum(merged.values())
    return words([f"{name} ({percent(us / whole)})" for name, us in merged.most_common(3)])


# -- request, step, communication, load ------------------------------------------------------------------------------


def _request(sources: Sources) -> str:
    title = "The way of one request"
    record = sources.get("request")
    if record is None or not record.rows:
        return section(title, missing("one request to a real server", command("request")))
    svg = plots.request_timeline(record)
    parts = [origin(record), sources.plot("request", svg, "One request: what ran when, by category")]
    windows = {"ttft": "To the first token", "itl": "From token to token (mean)"}
    for window, name in windows.items():
        operators = lookup(record, "operators", window) or {}
        whole = sum(operators.values())
        if whole:
            ordered = [(op, number(ms), percent(ms / whole)) for op, ms in operators.items()]
            parts.append(f"**{name}**, in the order of execution:\n\n" + table(("operator:", "ms", "share"), ordered))
    total = f"Operators and gaps add up to {number(lookup(record, 'ttft_sum_ms'))} of "
    total += (
        f"{number(lookup(record, 'ttft_ms'))} ms to the first token, and to {number(lookup(record, 'itl_sum_ms'))} "
    )
    total += f"of {number(lookup(record, 'itl_ms'))} ms a token after it."
    return section(title, *parts, total, skipped(record))


def _step(sources: Sources) -> str:
    title = "Where a decode step's time goes"
    record = sources.get("step")
    if record is None or not record.rows:
        return section(title, missing("a decode step by operator", command("step")))
    summary = record.summary
    where = f"Batch {summary.get('batch')}, context {number(summary.get('context'))}: "
    where += f"{number(summary.get('step_us'))} µs a step, {number(summary.get('gaps_us'))} of them in gaps."
    svg = plots.step_breakdown(record.rows, summary.get("gaps_us"))
    rows = sorted(record.rows, key=lambda row: row["us"], reverse=True)[:MOST_ROWS]
    lines = [
        (row["operator"], row["kernel"], number(row.get("calls")), number(row["us"]),
         size(row["bytes"]) if row.get("bytes") else "–", number(row.get("floor_us")), percent(row.get("fraction")))
        for row in rows
    ]  # fmt: skip
    head = ("operator:", "kernel:", "calls", "µs", "bytes", "floor µs", "of floor")
    shown = sources.plot("step", svg, "A decode step by operator, measured and floor")
    cached = "Above 100%: the bytes came from a cache." if any((r.get("fraction") or 0) > 1 for r in rows) else ""
    return section(title, origin(record), where, shown, table(head, lines), cached, skipped(record))


def _communication(sources: Sources) -> str:
    title = "Communication between ranks"
    record = sources.get("comm")
    if record is None or not record.rows:
        return section(title, missing("collectives between ranks", command("comm")))
    on_cpu = record.hardware.get("device") == "cpu"
    place = "CPU, gloo between processes" if on_cpu else str(record.hardware["name"])
    parts = [origin(record)]
    if on_cpu:
        parts.append(
            f"**{place}**: this says how the timeline is read, not what GPUs need; a run on several replaces it."
        )
    for op in dict.fromkeys(row["op"] for row in record.rows):
        svg = plots.path_crossover(op, record.rows, place)
        parts.append(sources.plot(f"comm-{op}", svg, f"{op}: time by size and path"))
    lines = [
        (row["op"], row["path"], size(row["bytes"]), row["world"], spread(row["us"]), number(row.get("algo_gbps")),
         number(row.get("bus_gbps")))
        for row in record.rows
    ]  # fmt: skip
    head = ("operation:", "path:", "bytes", "ranks", "µs (p10–p90)", "algorithm GB/s", "bus GB/s")
    parts.append(table(head, lines))
    if batches := lookup(record, "batches"):
        svg = plots.layer_shares(batches, record.summary["weights_us"])
        parts.append(sources.plot("comm-layer", svg, "A layer: weights and all-reduces, by batch"))
        steps = [
            (b["batch"], b["path"], number(b["layer_us"]), number(b["token_us"]), percent(b["share"])) for b in batches
        ]
        what = f"{record.summary['model']}, {record.summary['layers']} layers, two all-reduces each:"
        parts.append(f"{what}\n\n" + table(("batch", "path:", "µs a layer", "µs a token", "share of a layer"), steps))
    return section(title, *parts, skipped(record))


def _tp_timeline(sources: Sources) -> str:
    """When a decode step of a split model communicates."""
    title = "Timeline of a tensor-parallel step"
    record = sources.get("tp")
    if record is None or not record.rows:
        return section(title, missing("a decode step of a model split over ranks", command("tp")))
    facts = record.summary
    parts = [origin(record)]
    if facts["device"] == "cpu":
        parts.append("**CPU, gloo between processes**: the order of things is a GPU's, the times aren't.")
    layer = number(facts["comm_us"] / facts["layers"])
    parts.append(
        f"{facts['model']} on {facts['world']} ranks, batch {facts['batch']}, context {facts['context']}: "
        f"{number(facts['step_us'])} µs a step, of which {facts['calls']} collectives take "
        f"{number(facts['comm_us'])} µs ({percent(facts['share'])}), {layer} µs a layer."
    )
    plot = sources.plot("tp", plots.tp_timeline(record), "A decode step of a split model: computing, communicating")
    return section(title, *parts, plot, skipped(record))


def _load(sources: Sources) -> str:
    title = "A served model under load"
    record = sources.get("load")
    if record is None or not record.rows:
        return section(title, missing("a server under load", command("load")))
    lines = [(row["what"], number(row["value"]), row["unit"]) for row in record.rows]
    return section(title, origin(record), table(("what:", "value", "unit:"), lines), skipped(record))


# -- what to do, and what was claimed --------------------------------------------------------------------------------


def _opportunities(sources: Sources) -> str:
    """Ranked: what a decode step could lose, and what rulings have shown to gain."""
    found = [*_step_opportunities(sources.get("step")), *_ruled_opportunities(sources.get("rulings"))]
    title = "Opportunities, by priority"
    if not found:
        return section(title, missing("a decode step and the rulings", "minisgl profile step; minisgl profile rulings"))
    found.sort(key=lambda item: item[0], reverse=True)
    lines = [(i + 1, *item[1:]) for i, item in enumerate(found[:MOST_ROWS])]
    text = (
        "Shares of a step are what is left above the floor, so at most what can be gained; ruled gains were measured, "
        "on the kernel. Effort: small is a choice of version, medium a fusion or a launch less, large another kernel."
    )
    return section(title, text, table(("", "what:", "gain:", "effort:", "why:"), lines))


def _step_opportunities(record: Record | None) -> list[tuple[float, str, str, str, str]]:
    whole = lookup(record, "step_us")
    if record is None or not whole:
        return []
    found = []
    for row in record.rows:
        left = (row["us"] - (row.get("floor_us") or 0.0)) / whole
        if left >= 0.01:
            why = f"{number(row['us'])} µs, floor {number(row.get('floor_us') or 0.0)}"
            near = (row.get("fraction") or 0.0) >= 0.5
            found.append((left, f"{row['operator']} ({row['kernel']})", f"up to {percent(left)} of a step",
                          "medium" if near else "large", why))  # fmt: skip
    gaps = (lookup(record, "gaps_us") or 0.0) / whole
    if gaps >= 0.01:
        found.append((gaps, "gaps between kernels", f"up to {percent(gaps)} of a step", "medium", "launches in a row"))
    return found


def _ruled_opportunities(record: Record | None) -> list[tuple[float, str, str, str, str]]:
    rows = [row for row in record.rows if row["case"] is None and row.get("low", 0.0) > 0.01] if record else []
    return [
        (row["low"] / 10, f"{row['b']} instead of {row['a']}", measured(row), "small", f"ruling {row['claim']}")
        for row in rows
    ]


def _rulings(sources: Sources) -> str:
    title = "Rulings on claims"
    record = sources.get("rulings")
    if record is None or not record.rows:
        return section(title, missing("the claims", command("rulings")))
    pooled = [row for row in record.rows if row["case"] is None]
    lines = [(row["text"], f"**{row['verdict']}**", measured(row) if "gain" in row else "–", row.get("rounds", "–"),
              row.get("why", f"{row['b']} against {row['a']}")) for row in pooled]  # fmt: skip
    text = (
        "Interleaved A/B measurements of one run; the gain is time of A over time of B less one, with its 95% interval."
    )
    parts = [origin(record), text]
    if any("gain" in row for row in pooled):
        parts.append(sources.plot("rulings", plots.ruling_intervals(record.rows), "Gains with their intervals"))
    cases = [
        (row["claim"], case_text(row["case"]), spread(row["us_a"]), spread(row["us_b"]), measured(row), row["verdict"])
        for row in record.rows
        if row["case"] is not None
    ]
    parts.append(table(("claim:", "verdict:", "gain (interval):", "rounds", "arms:"), lines))
    if cases:
        head = ("claim:", "case:", "A µs (p10–p90)", "B µs (p10–p90)", "gain (interval):", "verdict:")
        parts.append("Case by case:\n\n" + table(head, cases))
    return section(title, *parts)


def _discrepancies(sources: Sources) -> str:
    title = "Expected and measured"
    record = sources.get("compare")
    if record is None:
        return section(title, missing("runs beside expected figures", command("compare")))
    findings = [(f["severity"], f["figure"], f["text"]) for f in record.summary.get("findings", [])]
    reference = f"The reference: {record.summary['reference']['source']}."
    parts = [origin(record), reference]
    if findings:
        parts.append("What can't be in it:\n\n" + table(("severity:", "figure:", "why:"), findings))
    lines = [
        (row["what"], row["against"], number(row["measured_us"]), number(row["expected_us"]),
         f"{number(row['ratio'])}×", row["cause"], row["next"])
        for row in record.rows[:MOST_ROWS]
    ]  # fmt: skip
    head = ("what:", "against:", "measured µs", "expected µs", "ratio", "likely cause:", "next experiment:")
    parts.append("Discrepancies, the largest first:\n\n" + table(head, lines) if lines else "Nothing differs.")
    return section(title, *parts)


def _conclusions(sources: Sources) -> str:
    points = []
    classes = _classes(sources)
    for word in ("launch", "bandwidth", "compute"):
        names = [name for name, text in classes if text.lower().startswith(word)]
        if names:
            points.append(f"{words(names)}: {word}-bound at most.")
    record = sources.get("rulings")
    for verdict in ("confirmed", "refuted", "no difference"):
        held = [row for row in record.rows if row["case"] is None and row["verdict"] == verdict] if record else []
        points += [f"{verdict.capitalize()}: {row['text']} ({measured(row)})." for row in held]
    gaps, whole = lookup(sources.get("step"), "gaps_us"), lookup(sources.get("step"), "step_us")
    if gaps is not None and whole:
        points.append(f"Gaps take {percent(gaps / whole)} of a decode step.")
    absent = [
        kind for kind in ("index", "store", "attention", "comm", "request", "step", "ncu") if not _has(sources, kind)
    ]
    if absent:
        points.append(
            f"Not measured yet: {words(absent)}; scripts/06_full_pipeline.sh measures all that a machine can."
        )
    return section("Conclusions", "\n".join(f"- {point}" for point in points))


def _has(sources: Sources, kind: str) -> bool:
    record: Mapping[str, Any] | Record | None = sources.get(kind)
    return isinstance(record, Record) and bool(record.rows)
