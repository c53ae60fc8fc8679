"""The timeline of a request: windows without holes, everything given to one thing, gaps named."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.profiling.graph_kernels import name_graph_kernels
from minisgl.profiling.spans import Span
from minisgl.profiling.timeline import NEXT_STEP, Answered, Piece, operator_of, partition, render, timeline
from minisgl.types import MinisglError

US = 1000  # nanoseconds


def span(name: str, start: int, end: int, process: str = "engine", *path: str) -> Span:
    """Times in microseconds."""
    return Span(name, start * US, end * US, process, "stream 7" if process == "gpu" else "main", path)


def told(pieces: Sequence[Piece]) -> list[tuple[str, float, str]]:
    return [(p.name, p.us, p.category) for p in pieces]


# One request of two tokens, as server and engine record it; what the client measured is `SEEN`.
SPANS = [
    span("step", -40, 60),  # of a request before it
    span("decode 1", -30, 50),
    span("connect", 0, 10, "client"),
    span("send request", 10, 20, "client"),
    span("tokenize", 50, 90, "server"),
    span("send to engine", 100, 110, "server"),
    span("apply", 130, 140),
    span("step", 140, 400),
    span("schedule", 150, 180),
    span("radix match", 160, 170),
    span("prefill 5", 180, 400),
    span("prepare", 180, 200),
    span("forward", 200, 380),
    span("layer 0", 210, 300),
    span("qkv", 210, 250),
    span("attention", 260, 300),
    span("layer 1", 300, 370),
    span("qkv", 300, 370),
    span("sample", 380, 400),
    span("step", 410, 460),
    span("decode 1", 415, 450),
    span("forward", 415, 450),
    span("layer 0", 415, 450),
    span("qkv", 415, 450),
    span("send", 470, 480),
    span("step", 482, 590),
    span("decode 1", 485, 580),
    span("forward", 485, 580),
    span("layer 0", 485, 580),
    span("qkv", 485, 580),
    span("detokenize", 500, 520, "server"),
    span("encode", 525, 530, "server"),
    span("send", 600, 610),
    span("step", 612, 700),
    span("detokenize", 620, 625, "server"),
]
SEEN = Answered(0, 560 * US, 650 * US, 5, 2)


def test_first_window_gives_every_moment_to_what_the_token_waits_for() -> None:
    found = timeline(SPANS, SEEN)
    assert told(found.ttft) == [
        ("connect", 10, "network"),
        ("send request", 10, "network"),
        ("http in", 30, "network"),
        ("tokenize", 40, "server"),
        ("gap in server", 10, "gap"),
        ("send to engine", 10, "server"),
        ("queue", 20, "network"),
        ("apply", 10, "server"),
        ("gap in step", 10, "gap"),
        ("schedule", 10, "schedule"),
        ("radix match", 10, "schedule"),
        ("schedule", 10, "schedule"),
        ("prepare", 20, "prefill"),
        ("gap in forward", 10, "gap"),
        ("qkv", 40, "prefill"),
        ("gap in layer", 10, "gap"),
        ("attention", 40, "prefill"),
        ("qkv", 70, "prefill"),
        ("gap in forward", 10, "gap"),
        ("sample", 20, "prefill"),
        ("gap in engine", 10, "gap"),
        ("gap in step", 5, "gap"),
        ("qkv", 35, "decode"),
        ("gap in step", 10, "gap"),
        ("gap in engine", 10, "gap"),
        ("send", 10, "server"),
        ("to server", 20, "network"),  # the engine's next step runs, but the first token doesn't wait for it
        ("detokenize", 20, "server"),
        ("gap in server", 5, "gap"),
        ("encode", 5, "server"),
        ("http out", 30, "network"),
    ]
    assert [p.layer for p in found.ttft if p.name == "qkv"] == [0, 1, 0]


def test_second_window_goes_from_token_to_token() -> None:
    found = timeline(SPANS, SEEN)
    assert told(found.decode) == [
        ("qkv", 20, "decode"),
        ("gap in step", 10, "gap"),
        ("gap in engine", 10, "gap"),
        ("send", 10, "server"),
        ("to server", 10, "network"),
        ("detokenize", 5, "server"),
        ("http out", 25, "network"),
    ]


def test_summary_adds_up_to_what_the_client_measured() -> None:
    found = timeline(SPANS, SEEN)
    summary = found.summary()
    assert (summary["ttft_ms"], summary["itl_ms"]) == (0.56, 0.09)
    assert (summary["ttft_sum_ms"], summary["itl_sum_ms"]) == (0.56, 0.09)
    assert (summary["ttft_gaps_ms"], summary["itl_gaps_ms"]) == (0.09, 0.02)
    assert summary["accounted"] == pytest.approx(1 - 110 / 650, abs=1e-4)
    assert found.operators(found.ttft)[NEXT_STEP] == pytest.approx(0.035)
    assert found.operators(found.ttft)["qkv"] == pytest.approx(0.11)


def test_rows_have_each_operator_of_the_prefill_and_each_decode_step() -> None:
    rows = timeline(SPANS, SEEN).rows()
    assert {
        "span": "connect",
        "start_us": 0.0,
        "us": 10.0,
        "category": "network",
        "layer": None,
        "window": "ttft",
    } in rows
    assert {"span": "qkv", "start_us": 300.0, "us": 70.0, "category": "prefill", "layer": 1, "window": "ttft"} in rows
    later = [(r["span"], r["start_us"], r["us"], r["category"]) for r in rows if r["window"] == "itl"]
    assert later[0] == ("decode step", 560.0, 20.0, "decode")
    assert sum(float(str(r["us"])) for r in rows) == 650
    assert all(b["start_us"] == pytest.approx(a["start_us"] + a["us"]) for a, b in pairwise(rows))  # type: ignore[operator]


def test_kernels_come_before_the_host_that_launched_them() -> None:
    launched = ("step", "prefill 5", "forward", "layer 3", "qkv")
    spans = [
        span("step", 0, 100),
        span("prefill 5", 0, 60),
        span("forward", 0, 60),
        span("layer 3", 0, 60),
        span("qkv", 0, 30),
        span("collect", 60, 100),
        span("gemm", 10, 80, "gpu", *launched),
        span("argmax", 85, 90, "gpu", "step", "prefill 5", "sample"),
        span("fused_moe", 92, 96, "gpu", "step", "prefill 5", "forward"),
    ]
    pieces = partition(spans, 0, 100 * US, 100 * US)
    assert told(pieces) == [
        ("host launches", 10, "gap"),
        ("qkv", 70, "kernel"),
        ("collect", 5, "decode"),
        ("sample", 5, "kernel"),
        ("collect", 2, "decode"),
        ("fused_moe", 4, "kernel"),
        ("collect", 4, "decode"),
    ]
    assert (pieces[1].layer, pieces[1].step, pieces[5].step) == (3, "prefill", "prefill")


def test_first_token_does_not_wait_for_the_next_steps_kernels() -> None:
    spans = [
        span("prefill 5", 0, 10),
        span("collect", 20, 60),
        span("send", 60, 70),
        span("gemm", 5, 40, "gpu", "prefill 5", "forward", "layer 0", "qkv"),
        span("gemm", 40, 90, "gpu", "decode 1", "forward"),
    ]
    pieces = partition(spans, 0, 80 * US, 80 * US)
    assert [(p.name, p.us) for p in pieces] == [
        ("gap in prefill", 5), ("qkv", 35), ("collect", 20), ("send", 10), ("gemm", 10),
    ]  # fmt: skip


def test_operator_of_a_graphs_kernel_is_its_name() -> None:
    assert operator_of(span("gemm", 0, 1, "gpu", "step", "decode 8", "forward")) == "gemm"
    assert operator_of(span("gemm", 0, 1, "gpu", "step", "prefill 8", "forward", "layer 1", "o")) == "o"
    assert operator_of(span("memset", 0, 1, "gpu")) == "memset"


def test_what_sampling_launches_is_of_the_operator_sample() -> None:
    for kernel in ("_sample_blocks", "_best_block", "void at::native::indexSelectSmallIndex<int>(int)", "Memcpy DtoH"):
        assert operator_of(span(kernel, 0, 1, "gpu", "step", "prefill 8", "sample")) == "sample"
    graph = [span(kernel, at, at + 1, "gpu", "step", "decode 8", "forward")
             for at, kernel in enumerate(("gemm", "_sample_blocks", "_best_block"))]  # fmt: skip
    assert [operator_of(kernel) for kernel in name_graph_kernels(graph)] == ["lm head", "sample", "sample"]


times = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted)
processes = st.sampled_from(["gpu", "engine", "server", "client"])
random_spans = st.lists(
    st.tuples(st.sampled_from(["step", "layer 1", "qkv", "forward"]), times, processes), max_size=12
)


@given(random_spans, st.integers(0, 30), st.integers(31, 60), st.integers(0, 70))
def test_partition_has_no_hole_and_no_overlap(
    made: list[tuple[str, list[int], str]], start: int, end: int, until: int
) -> None:
    spans = [span(name, a, b, process) for name, (a, b), process in made]
    pieces = partition(spans, start * US, end * US, until * US)
    assert (pieces[0].start, pieces[-1].end) == (start * US, end * US)
    assert all(one.end == other.start for one, other in pairwise(pieces))
    assert all(p.us > 0 and p.name for p in pieces)
    assert not [p for p in pieces if p.process in ("engine", "gpu") and p.category != "gap" and p.start >= until * US
                and p.category != "network"]  # fmt: skip


def test_timeline_without_the_tokens_way_says_so() -> None:
    with pytest.raises(MinisglError, match="no token on its way"):
        timeline([s for s in SPANS if s.name != "send"], SEEN)


def test_table_shows_where_things_lie() -> None:
    text = render("a window", timeline(SPANS, SEEN).ttft, width=56)
    lines = {line.split("  ")[1]: line for line in text.splitlines()[2:]}
    assert text.startswith("a window: 0.560 ms")
    assert lines["tokenize"].endswith(" " * 5 + "█" * 4 + " " * 47)
    assert "7.1%" in lines["tokenize"] and "0.040" in lines["tokenize"]
