"""The statistics of the rulings, on simulated measurements whose truth is known."""

from __future__ import annotations

import random

import pytest

from minisgl.profiling.statistics import gain_of, interleave, pooled_gain, student_quantile


def simulate(seed: int, gain: float, noise: float, rounds: int = 10) -> tuple[list[float], list[float]]:
    """Times of A and B in microseconds: drift that both share, noise of each."""
    rng = random.Random(seed)
    drift = [10 * (1 + 0.3 * i / rounds) for i in range(rounds)]
    a = [d * (1 + gain) * rng.lognormvariate(0, noise) for d in drift]
    return a, [d * rng.lognormvariate(0, noise) for d in drift]


@pytest.mark.parametrize(
    "p, df, value",
    [(0.975, 4, 2.7764), (0.975, 9, 2.2622), (0.8, 4, 0.9410), (0.95, 30, 1.6973), (0.975, 1, 12.7062)],
)
def test_quantiles_are_those_of_the_tables(p: float, df: int, value: float) -> None:
    assert student_quantile(p, df) == pytest.approx(value, abs=1e-4)


def test_interval_holds_the_true_gain_as_often_as_it_says() -> None:
    gains = [gain_of(*simulate(seed, 0.10, 0.03)) for seed in range(400)]
    assert 0.92 <= sum(g.low <= 0.10 <= g.high for g in gains) / len(gains) <= 0.98


def test_no_gain_is_rarely_taken_for_one() -> None:
    gains = [gain_of(*simulate(seed, 0.0, 0.03)) for seed in range(400)]
    assert sum(g.clear for g in gains) / len(gains) <= 0.08


def test_gain_of_the_detectable_size_is_found_in_four_of_five_runs() -> None:
    least = sum(gain_of(*simulate(seed, 0.0, 0.03)).detectable for seed in range(400)) / 400
    found = [gain_of(*simulate(seed, least, 0.03)).clear for seed in range(400)]
    assert 0.7 <= sum(found) / len(found) <= 0.95


def test_drift_that_both_arms_share_costs_no_precision() -> None:
    assert gain_of(*simulate(0, 0.05, 0.0)).high == pytest.approx(0.05)


def test_slower_is_a_negative_gain() -> None:
    slower = gain_of([10.0] * 5, [12.5] * 5)
    assert slower.estimate == pytest.approx(-0.2)
    assert slower.clear and slower.high < 0


def test_pooled_gain_weighs_cases_alike() -> None:
    small, large = ([2.0] * 5, [1.0] * 5), ([5000.0] * 5, [10_000.0] * 5)
    assert pooled_gain([small, large]).estimate == pytest.approx(0.0)


@pytest.mark.parametrize("a, b", [([1.0] * 4, [1.0] * 4), ([1.0] * 6, [1.0] * 5), ([1.0] * 5, [1.0] * 4 + [0.0])])
def test_too_little_to_judge_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="expected as many|coarse"):
        gain_of(a, b)


def test_arms_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def arm(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({"a": lambda: arm("a"), "b": lambda: arm("b")}, rounds=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}
