"""The plots of the reports, as SVG: the same records always give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minisgl.profiling.compare import best_rows, median_us
from minisgl.profiling.record import Record
from minisgl.types import MinisglError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7B00", "#000000")
CATEGORIES = {
    "network": "#999999", "server": "#56B4E9", "schedule": "#E69F00", "prefill": "#0072B2", "decode": "#009E73",
    "kernel": "#0072B2", "gap": "#D55E00",
}  # fmt: skip
_STYLE: Any = {
    "svg.hashsalt": "minisgl", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": 9, "legend.framealpha": 0.9,
}  # fmt: skip
_WIDTH = 6.6  # inches; narrow enough to be read on a telephone


def draw(fill: Callable[[Axes], None], height: float = 3.6) -> str:
    """The SVG of what `fill` draws.

    Raises:
        MinisglError: matplotlib isn't installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MinisglError("reports draw with matplotlib: pip install 'minisgl[profile]'") from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        fill(figure.add_subplot())
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def size_roofline(kernel: str, rows: Sequence[dict[str, Any]], ceilings: Mapping[str, float]) -> str:
    """Bandwidth against bytes moved, under the roofs of launch and memory: which binds is where they cross."""

    def fill(axes: Axes) -> None:
        sizes = sorted({row["bytes"] for row in rows})
        span = [sizes[0] / 2, sizes[-1] * 2]
        grid = [span[0] * (span[1] / span[0]) ** (i / 60) for i in range(61)]
        launch = next((ceilings[n] for n in ("launch_pdl_us", "launch_us", "call_us") if n in ceilings), None)
        for name, label, style in (("hbm_gbps", "HBM", "-"), ("l2_gbps", "L2", ":"), ("cpu_gbps", "memory", "-")):
            if name in ceilings:
                roof = [min(ceilings[name], b / launch / 1e3) if launch else ceilings[name] for b in grid]
                axes.plot(grid, roof, style, color="#555555", label=f"roof: launch, then {label}")
        series: dict[str, list[tuple[float, float]]] = {}
        for row in [row for row in rows if row.get("version") in ("copy", "torch")] + best_rows(rows):
            us = median_us(row)
            if us:
                series.setdefault(row["version"], []).append((row["bytes"], row["bytes"] / us / 1e3))
        for (name, points), colour in zip(sorted(series.items()), COLOURS, strict=False):
            axes.plot(*zip(*sorted(points), strict=True), "o", color=colour, label=name, markersize=4, alpha=0.8)
        axes.set(
            xscale="log", yscale="log", xlabel="bytes moved", ylabel="GB/s", title=f"{kernel}: bandwidth and roofs"
        )
        axes.legend()

    return draw(fill)


def intensity_roofline(rows: Sequence[dict[str, Any]], ceilings: Mapping[str, float]) -> str:
    """The classic roofline: operations a second against operations a byte."""
    memory = ceilings.get("hbm_gbps", ceilings.get("cpu_gbps"))
    peak = ceilings.get("bf16_tflops", ceilings.get("cpu_tflops"))

    def fill(axes: Axes) -> None:
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            us = median_us(row)
            if us and row.get("flops") and row.get("bytes"):
                label = " ".join(str(row[k]) for k in ("kernel", "phase") if k in row)
                points.setdefault(label, []).append((row["flops"] / row["bytes"], row["flops"] / us / 1e6))
        every = [x for pairs in points.values() for x, _ in pairs]
        if memory and peak and every:
            ridge = peak * 1e3 / memory
            low, high = min(*every, ridge) / 2, max(*every, ridge) * 2
            grid = [low * (high / low) ** (i / 60) for i in range(61)]
            axes.plot(grid, [min(peak, x * memory / 1e3) for x in grid], "-", color="#555555", label="roof")
        for (name, pairs), colour in zip(sorted(points.items()), COLOURS * 4, strict=False):
            axes.plot(*zip(*pairs, strict=True), "o", color=colour, label=name, markersize=4, alpha=0.8)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title="Roofline")
        axes.legend()

    return draw(fill, 4.0)


def version_times(kernel: str, series: Mapping[str, Mapping[int, float]], along: str) -> str:
    """Microseconds against size, a line a version."""

    def fill(axes: Axes) -> None:
        for (name, times), colour in zip(series.items(), COLOURS * 4, strict=False):
            axes.plot(*zip(*sorted(times.items()), strict=True), "o-", color=colour, label=name, markersize=3, lw=1.2)
        axes.set(xscale="log", yscale="log", xlabel=along, ylabel="µs a call", title=f"{kernel}: versions")
        axes.legend(ncols=2)

    return draw(fill)


def step_breakdown(rows: Sequence[dict[str, Any]], gaps_us: float | None) -> str:
    """Microseconds of each operator of a decode step, and what its bytes need at least."""
    merged: dict[str, list[float]] = {}
    for row in rows:
        entry = merged.setdefault(row["operator"], [0.0, 0.0])
        entry[0] += row["us"]
        entry[1] += row.get("floor_us") or 0.0
    order = sorted(merged, key=lambda name: merged[name][0])

    def fill(axes: Axes) -> None:
        axes.barh(order, [merged[n][0] for n in order], color=COLOURS[0], label="measured")
        axes.barh(order, [merged[n][1] for n in order], color=COLOURS[1], height=0.35, label="floor")
        if gaps_us:
            axes.barh(["gaps"], [gaps_us], color=CATEGORIES["gap"], label="gaps")
        axes.set(xlabel="µs a step", title="One decode step")
        axes.legend(loc="lower right")

    return draw(fill, 1.2 + 0.3 * (len(order) + 1))


def request_timeline(record: Record) -> str:
    """What ran when, from the request's first byte on, a lane a category."""
    rows = [row for row in record.rows if row["us"] > 0]
    lanes = [name for name in CATEGORIES if any(row["category"] == name for row in rows)]

    def fill(axes: Axes) -> None:
        for lane in lanes:
            bars = _joined([row for row in rows if row["category"] == lane])
            axes.broken_barh(bars, (len(lanes) - 1 - lanes.index(lane) - 0.4, 0.8), facecolors=CATEGORIES[lane])
        ttft = record.summary.get("ttft_ms")
        if ttft:
            axes.axvline(ttft, color="#000000", lw=1)
            axes.text(ttft, -0.5, " first token", fontsize=9)
        axes.set_yticks(range(len(lanes)), list(reversed(lanes)))
        axes.set(xlabel="ms since the request was sent", title="One request")
        axes.grid(axis="y", visible=False)

    return draw(fill, 1.3 + 0.35 * len(lanes))


def _joined(rows: Sequence[dict[str, Any]], parts: int = 2000) -> list[tuple[float, float]]:
    """Bars as (start, width) in ms; those closer than a picture can show become one."""
    bars: list[tuple[float, float]] = []
    nearest = max((row["start_us"] + row["us"] for row in rows), default=0.0) / 1e3 / parts
    for row in sorted(rows, key=lambda row: float(row["start_us"])):
        start, end = row["start_us"] / 1e3, (row["start_us"] + row["us"]) / 1e3
        if bars and start - sum(bars[-1]) < nearest:
            bars[-1] = bars[-1][0], max(end, sum(bars[-1])) - bars[-1][0]
        else:
            bars.append((start, end - start))
    return bars


def path_crossover(op: str, rows: Sequence[dict[str, Any]], label: str) -> str:
    """Microseconds of a collective against its bytes, a line a path: where lines cross, the choice changes."""
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        us = median_us(row)
        if row["op"] == op and us:
            series.setdefault(row["path"], {})[row["bytes"]] = us

    def fill(axes: Axes) -> None:
        for (name, times), colour in zip(series.items(), COLOURS * 4, strict=False):
            axes.plot(*zip(*sorted(times.items()), strict=True), "o-", color=colour, label=name, markersize=3, lw=1.2)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs", title=f"{op.replace('_', '-')}, {label}")
        axes.legend()

    return draw(fill)


def ruling_intervals(rows: Sequence[dict[str, Any]]) -> str:
    """The measured gain of each claim with its interval; what was claimed as a band behind it."""
    colours = {"confirmed": COLOURS[2], "refuted": COLOURS[5], "no difference": "#888888"}
    measured = [row for row in rows if row["case"] is None and "gain" in row]
    names = [f"{row['claim']} (recorded)" if "recorded" in row else row["claim"] for row in measured]

    def fill(axes: Axes) -> None:
        edge = max([abs(100 * row[k]) for row in measured for k in ("low", "high")] + [25.0]) * 1.1
        for at, row in enumerate(reversed(measured)):
            low, high = ((-edge if row["claimed"][0] is None else 100 * row["claimed"][0]),
                         (edge if row["claimed"][1] is None else 100 * row["claimed"][1]))  # fmt: skip
            axes.broken_barh([(low, high - low)], (at - 0.4, 0.8), facecolors="#dbe4ec")
            colour = colours[row["verdict"]]
            axes.plot([100 * row["low"], 100 * row["high"]], [at, at], "-", color=colour, lw=2)
            axes.plot(100 * row["gain"], at, "o", color=colour)
        axes.axvline(0, color="#000000", lw=0.8)
        axes.set_yticks(range(len(measured)), names[::-1])
        axes.set(xlim=(-edge, edge), xlabel="gain of B over A, % (band: what is claimed)", title="Rulings")
        axes.grid(axis="y", visible=False)

    return draw(fill, 1.3 + 0.32 * len(measured))


def layer_shares(batches: Sequence[dict[str, Any]], weights_us: float) -> str:
    """A layer of a decode step on one rank, by batch: reading its weights, then the two all-reduces."""
    names = [f"batch {batch['batch']}" for batch in batches][::-1]
    comm = [batch["layer_us"] for batch in batches][::-1]

    def fill(axes: Axes) -> None:
        axes.barh(names, [weights_us] * len(names), color=COLOURS[0], label="weights of a layer")
        axes.barh(names, comm, left=weights_us, color=COLOURS[1], label="two all-reduces")
        axes.set(xlabel="µs a layer", title="Communication in a layer")
        axes.legend()

    return draw(fill, 1.4 + 0.3 * len(names))


def tp_timeline(record: Record) -> str:
    """A decode step of one rank: collectives, and what lies between them."""
    whole = record.summary["step_us"] / 1e3
    colours = {"all_reduce": COLOURS[1], "all_gather": COLOURS[3]}

    def fill(axes: Axes) -> None:
        axes.broken_barh([(0, whole)], (-0.4, 0.8), facecolors=COLOURS[0], label="computing, and the rest")
        for op, colour in colours.items():
            bars = [(row["start_us"] / 1e3, row["us"] / 1e3) for row in record.rows if row["op"] == op]
            if bars:
                axes.broken_barh(bars, (-0.4, 0.8), facecolors=colour, label=op.replace("_", "-"))
        axes.set_yticks([0], ["rank 0"])
        axes.set(xlabel="ms", title="One decode step", ylim=(-0.5, 1.3))
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=3, loc="upper left")

    return draw(fill, 2.0)
