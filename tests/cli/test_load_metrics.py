"""A load test's arithmetic on known timings, its prompts and its arrivals."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.cli.bench_options import Range
from minisgl.cli.load_metrics import Sample, parse_goals, percentile, summarise
from minisgl.cli.load_prompts import Plan, arrival_times, draw_requests
from minisgl.types import ConfigError

# Three requests on one clock: the second one slow, the third one failed.
RECORDED = [
    Sample(10.0, [10.2, 10.3, 10.4, 10.6], 10.6, prompt_tokens=100, cached_tokens=50, output_tokens=5),
    Sample(10.5, [11.5, 12.5], 12.5, prompt_tokens=200, cached_tokens=0, output_tokens=3),
    Sample(11.0, [], 11.1, error="503 busy"),
]


def test_summary_of_recorded_timings() -> None:
    summary = summarise(RECORDED, {"ttft": 0.3, "tpot": 0.2})
    assert (summary["requests"], summary["failed"], summary["errors"]) == (3, 1, {"503 busy": 1})
    assert summary["seconds"] == 2.5  # from 10.0 to 12.5
    assert summary["requests_per_second"] == 2 / 2.5
    assert summary["output_tokens_per_second"] == 8 / 2.5
    assert summary["tokens_per_second"] == 308 / 2.5
    assert (summary["prompt_tokens"], summary["cached_tokens"], summary["output_tokens"]) == (300, 50, 8)
    assert summary["tokens_per_chunk"] == round(8 / 6, 3)
    assert summary["ttft_ms"] == {"mean": 600, "median": 600, "p90": 920, "p99": 992}  # 200 and 1000
    assert summary["tpot_ms"] == {"mean": 300, "median": 300, "p90": 460, "p99": 496}  # 400/4 and 1000/2
    assert summary["itl_ms"] == {"mean": 350, "median": 150, "p90": 760, "p99": 976}  # 100, 100, 200, 1000
    assert summary["e2e_ms"] == {"mean": 1300, "median": 1300, "p90": 1860, "p99": 1986}  # 600 and 2000
    assert summary["goodput"] == {
        "goals_ms": {"ttft": 300, "tpot": 200},
        "requests_per_second": 1 / 2.5,
        "fraction": 0.3333,
    }


def test_summary_without_usage_has_no_token_figures() -> None:
    summary = summarise([Sample(0.0, [1.0, 2.0], 2.0)], {})
    assert summary["output_tokens"] is summary["output_tokens_per_second"] is summary["tokens_per_second"] is None
    assert summary["tpot_ms"] is None and summary["ttft_ms"]["median"] == 1000
    assert "goodput" not in summary


def test_answer_of_one_token_has_no_time_between_tokens() -> None:
    sample = Sample(0.0, [1.0], 1.0, output_tokens=1)
    assert sample.tpot is None and sample.itl == []
    assert sample.meets({"ttft": 1.0, "tpot": 0.001, "e2e": 1.0}) and not sample.meets({"ttft": 0.9})


def test_failed_request_meets_no_goal() -> None:
    assert not Sample(0.0, [0.1], 0.1, error="x").meets({"e2e": 9.0})


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    assert percentile(ordered, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


def test_goals_are_milliseconds() -> None:
    assert parse_goals(["ttft:200", "tpot:50.5"]) == {"ttft": 0.2, "tpot": 0.0505}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "ttft:inf", "itl:3", "ttft:nan"])
def test_goals_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected ttft, tpot, e2e"):
        parse_goals([text])


# -- prompts and arrivals ------------------------------------------------------------------------------------------


def test_requests_are_drawn_within_their_ranges_and_again_by_their_seed() -> None:
    plan = Plan(200, Range(3, 9), Range(1, 4), token_ids=Range(5, 8), seed=2)
    requests = draw_requests(plan)
    assert {len(prompt) for prompt, _ in requests} == set(range(3, 10))
    assert {n for _, n in requests} == {1, 2, 3, 4}
    assert {token for prompt, _ in requests for token in prompt} == {5, 6, 7, 8}
    assert draw_requests(plan) == requests != draw_requests(Plan(200, Range(3, 9), Range(1, 4), seed=3))


def test_prefixes_are_shared_by_groups() -> None:
    requests = draw_requests(Plan(50, Range(4, 4), Range(1, 1), shared_prefix=20, prefix_groups=3))
    assert {len(prompt) for prompt, _ in requests} == {24}
    assert len({tuple(prompt[:20]) for prompt, _ in requests}) == 3
    assert len({tuple(prompt[20:]) for prompt, _ in requests}) == 50


def test_text_prompts_are_words() -> None:
    requests = draw_requests(Plan(5, Range(7, 7), Range(1, 1), shared_prefix=3, text=True))
    assert {len(prompt.split()) for prompt, _ in requests if isinstance(prompt, str)} == {10}


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(20_000, 50.0, seed=0)
    gaps = np.diff(times)
    assert times[0] == 0 and gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03), "exponential gaps deviate by their mean"
    assert np.mean(gaps > 1 / 50) == pytest.approx(np.exp(-1), abs=0.01)
    assert arrival_times(3, float("inf"), seed=0) == [0.0, 0.0, 0.0]
