"""`final-report.md`: what binds each kernel, what optimizations gave, where a request and a step spend their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.profiling.record import Record
from minisgl.profiling.report import plots
from minisgl.profiling.report.advice import MOST_ROWS, classes, conclusions, discrepancies, opportunities, rulings
from minisgl.profiling.report.collectives import MARK, ruled
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
from minisgl.profiling.spans import short_name

MAIN_SHARE = 0.02  # of a step: a kernel that takes less isn't one of its main ones
MOST_SIZES = 6  # of a collective, in the table; the plots have all


def render(sources: Sources) -> str:
    """The whole page."""
    parts = [_summary(sources), _request(sources), _step(sources), _communication(sources), _tp_timeline(sources)]
    parts += [
        _load(sources),
        opportunities(sources),
        rulings(sources),
        discrepancies(sources),
        conclusions(sources),
    ]
    return section("Final report", *parts, level=1)


def _verdicts(record: Record | None) -> Counter[str]:
    return Counter(row["verdict"] for row in record.rows if row["case"] is None) if record else Counter()


# -- executive summary -----------------------------------------------------------------------------------------------


def _summary(sources: Sources) -> str:
    points = [_measured_on(sources)]
    points += [f"**{name}**: {text}" for name, text in classes(sources)]
    if step := _top_operators(sources.get("step")):
        points.append(f"**A decode step**{_of_model(sources.get('step'))}{sources.mark('step')} spends most on {step}.")
    if limits := _binding(sources.get("step")):
        points.append(f"**What limits a step's kernels**{sources.mark('step')}, by the roofline: {limits}.")
    request = sources.get("request")
    if request and lookup(request, "ttft_ms"):
        points.append(
            f"**A request**{_of_model(request, 'to')}{sources.mark('request')} of {lookup(request, 'prompt_tokens')} "
            "tokens has its first token "
            f"after {number(lookup(request, 'ttft_ms'))} ms and one every {number(lookup(request, 'itl_ms'))} ms; "
            f"{percent(lookup(request, 'accounted'))} of that time is accounted for by operators."
        )
    verdicts = _verdicts(claims := ruled(sources))
    if verdicts:
        told = words([f"{count} {verdict}" for verdict, count in verdicts.most_common()])
        recorded = sum("recorded" in row and row["case"] is None for row in claims.rows) if claims else 0
        points.append(f"**Claims**: {told}{f'; {recorded} of them {MARK}' if recorded else ''}.")
    return section("Executive summary", "\n".join(f"- {point}" for point in points))


def _measured_on(sources: Sources) -> str:
    """The machine; and what was measured on a CPU in its stead."""
    records = sources.records
    stand_ins = [kind for kind in records if sources.stands_in(records[kind])]
    machines = list(dict.fromkeys(r.hardware["name"] for kind, r in records.items() if kind not in stand_ins))
    if not machines:
        return "Nothing has been measured yet."
    others = f" On a CPU instead, until a GPU has done it: {words(stand_ins)}." if stand_ins else ""
    return f"Measured on {words(machines)}.{others}"


def _place(kind: str, sources: Sources) -> list[str]:
    """What stands above a section whose figures a CPU has measured, among a GPU's; and why the GPU has none."""
    record = sources.get(kind)
    why = [f"Left out: {reason}." for reason in sources.reasons.get(kind, ())]
    if record is None or not record.rows or not sources.stands_in(record):
        return why
    note = (
        f"**Measured on a CPU**: it shows how to read this, not what a GPU takes; `{command(kind)}` there replaces it."
    )
    return [note, *why]


def _top_operators(record: Record | None) -> str:
    if record is None or not record.rows:
        return ""
    merged: Counter[str] = Counter()
    for row in record.rows:
        merged[row["operator"]] += row["us"]
    whole = lookup(record, "step_us") or sum(merged.values())
    return words([f"{name} ({percent(us / whole)})" for name, us in merged.most_common(3)])


def _of_model(record: Record | None, word: str = "of") -> str:
    """' of qwen3-0.6b', where the record says which model it was."""
    model = lookup(record, "model")
    return f" {word} {model}" if model else ""


def _binding(record: Record | None) -> str:
    """Which limit binds the kernels that take most of a step, by the share of the step in such kernels."""
    rows = record.rows if record else []
    whole = lookup(record, "step_us") or sum(row["us"] for row in rows)
    shares: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["us"], reverse=True):
        if row.get("limit") and row["us"] >= MAIN_SHARE * whole:
            shares[row["limit"]] += row["us"] / whole
            names.setdefault(row["limit"], []).append(row["operator"])
    return words(
        [f"{limit} binds {words(names[limit])} ({percent(us)} of the step)" for limit, us in shares.most_common()]
    )


# -- request, step, communication, load ------------------------------------------------------------------------------


def _request(sources: Sources) -> str:
    title = "The way of one request"
    record = sources.get("request")
    if record is None or not record.rows:
        return section(title, missing("one request to a real server", command("request")), *_place("request", sources))
    svg = plots.request_timeline(record)
    what = f"One request{_of_model(record, 'to')}: {number(lookup(record, 'prompt_tokens'))} tokens in, "
    what += f"{number(lookup(record, 'output_tokens'))} out."
    parts = [
        origin(record),
        *_place("request", sources),
        what,
        sources.plot("request", svg, "One request: what ran when, by category"),
    ]
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
        return section(title, missing("a decode step by operator", command("step")), *_place("step", sources))
    summary = record.summary
    model = f"{summary['model']}, batch" if "model" in summary else "Batch"
    where = f"{model} {summary.get('batch')}, context {number(summary.get('context'))}: "
    where += f"{number(summary.get('step_us'))} µs a step, {number(summary.get('gaps_us'))} of them in gaps."
    svg = plots.step_breakdown(record.rows, summary.get("gaps_us"))
    rows = sorted(record.rows, key=lambda row: row["us"], reverse=True)[:MOST_ROWS]
    lines = [
        (row["operator"], short_name(row["kernel"]), number(row.get("calls")), number(row["us"]),
         size(row["bytes"]) if row.get("bytes") else "–", number(row.get("floor_us")), row.get("limit") or "–",
         percent(row.get("fraction")))
        for row in rows
    ]  # fmt: skip
    head = ("operator:", "kernel:", "calls", "µs", "bytes", "floor µs", "limit:", "of floor")
    shown = sources.plot("step", svg, "A decode step by operator, measured and floor")
    why = "Above 100%: the bytes came from a cache, or were on their way before the kernel ahead had ended."
    cached = why if any((r.get("fraction") or 0) > 1 for r in rows) else ""
    place = _place("step", sources)
    return section(title, origin(record), *place, where, shown, table(head, lines), cached, skipped(record))


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
    rows, alone = record.rows, all(row["world"] == 1 for row in record.rows)
    if alone:
        rows, place = [row for row in rows if not _does_nothing(row)], f"{place}, one rank"
        parts.append(
            "**One rank**: nothing crosses a link. The times are what our kernels and the copies into buffers cost. In "
            "place NCCL does nothing for one rank: its all-gather, `direct` and `registered` are left out."
        )
    for op in dict.fromkeys(row["op"] for row in rows):
        plot = plots.path_crossover(op, rows, place)
        parts.append(sources.plot(f"comm-{op}", plot, f"{op}: time by size and path"))
    parts += [_collectives(rows, alone), "" if alone else _layers(record, sources)]
    return section(title, *parts, skipped(record))


def _does_nothing(row: Mapping[str, Any]) -> bool:
    """Whether a collective launches nothing for one rank: what was timed is an empty graph."""
    return row["op"] == "all_gather" or (row["op"] == "all_reduce" and row["path"] in ("direct", "registered"))


def _collectives(rows: Sequence[Mapping[str, Any]], alone: bool) -> str:
    """A table of times, of some sizes where there are many; with bandwidths, unless a rank is alone."""
    sizes = sorted({row["bytes"] for row in rows})
    few = sizes if len(sizes) <= MOST_SIZES else {*sizes[::4], sizes[-1]}
    rates = {} if alone else {"algo_gbps": "algorithm GB/s", "bus_gbps": "bus GB/s"}
    lines = [
        (row["op"], row["path"], size(row["bytes"]), row["world"], spread(row["us"]),
         *(number(row.get(name)) for name in rates))
        for row in rows
        if row["bytes"] in few
    ]  # fmt: skip
    more = f"\n\n_{len(rows) - len(lines)} other rows are in the JSON._" if len(lines) < len(rows) else ""
    head = ("operation:", "path:", "bytes", "ranks", "µs (p10–p90)", *rates.values())
    return table(head, lines) + more


def _layers(record: Record, sources: Sources) -> str:
    """What the all-reduces add to the layers of a model, by batch."""
    batches = lookup(record, "batches")
    if not batches:
        return ""
    svg = plots.layer_shares(batches, record.summary["weights_us"])
    plot = sources.plot("comm-layer", svg, "A layer: weights and all-reduces, by batch")
    steps = [
        (b["batch"], b["path"], number(b["layer_us"]), number(b["token_us"]), percent(b["share"])) for b in batches
    ]
    what = f"{record.summary['model']}, {record.summary['layers']} layers, two all-reduces each:"
    shown = table(("batch", "path:", "µs a layer", "µs a token", "share of a layer"), steps)
    return f"{plot}\n\n{what}\n\n{shown}"


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
        return section(title, missing("a server under load", command("load")), *_place("load", sources))
    lines = [(row["what"], number(row["value"]), row["unit"]) for row in record.rows]
    place = _place("load", sources)
    shown = table(("what:", "value", "unit:"), lines)
    return section(title, origin(record), *place, _load_settings(record), shown, skipped(record))


def _load_settings(record: Record) -> str:
    """What was asked of the server: the model, how many requests, how many at once, how long."""
    settings = lookup(record, "settings") or {}
    if not settings:
        return ""
    told = [f"{number(settings.get('num_requests'))} requests"]
    if settings.get("concurrency"):
        told.append(f"{number(settings['concurrency'])} at once")
    for key, word in (("input_len", "in"), ("output_len", "out")):
        if lengths := settings.get(key):
            told.append(f"{_lengths(lengths)} tokens {word}")
    return f"{settings.get('model')}: {', '.join(told)}."


def _lengths(value: Sequence[int] | int) -> str:
    return f"{value}" if isinstance(value, int) else "–".join(str(length) for length in dict.fromkeys(value))
