"""Claims, the verdicts on them, and the comparison's arms."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minisgl.distributed.allreduce import AllReduce
from minisgl.distributed.paths import Machine, PathTable
from minisgl.kernels.spec import registry
from minisgl.profiling import rulings
from minisgl.profiling.collective_arms import FIXED_BYTES, path_called
from minisgl.profiling.expected import Claim, load_claims
from minisgl.profiling.experiments import EXPERIMENTS, NotMeasurable
from minisgl.profiling.rulings import describe, judge, measured, rule, rule_on
from minisgl.profiling.statistics import Gain

CLAIM = next(claim for claim in load_claims() if claim.id == "std-mismatch")


def gain(low: float, high: float) -> Gain:
    return Gain((low + high) / 2, low, high, 0.05, 10)


@pytest.mark.parametrize(
    "low, high, claimed, verdict",
    [
        (0.08, 0.13, (0.10, None), "confirmed"),
        (0.02, 0.06, (0.10, None), "refuted"),  # a gain, but not the one claimed
        (-0.08, -0.02, (0.10, None), "refuted"),
        (-0.02, 0.12, (0.10, None), "no difference"),
        (0.11, 0.15, (0.10, 0.20), "confirmed"),
        (0.21, 0.30, (0.10, 0.20), "refuted"),
        (-0.01, 0.01, (None, 0.02), "confirmed"),
        (-0.10, -0.05, (None, 0.02), "confirmed"),
        (-0.01, 0.04, (None, 0.02), "no difference"),
        (0.01, 0.04, (None, 0.02), "no difference"),
        (0.03, 0.05, (None, 0.02), "refuted"),
        (0.01, 0.50, (0.0, None), "confirmed"),
    ],
)
def test_verdict_follows_from_interval_and_claim(
    low: float, high: float, claimed: tuple[float | None, float | None], verdict: str
) -> None:
    assert judge(gain(low, high), claimed) == verdict


def simulated(true_gain: float, noise: float) -> dict[str, Any]:
    rng = random.Random(1)

    @contextmanager
    def arms(claim: Claim, case: Any) -> Iterator[Any]:
        yield (lambda: 10 * (1 + true_gain) * rng.lognormvariate(0, noise), lambda: 10 * rng.lognormvariate(0, noise))

    return {"compare": arms}


def test_known_effect_is_measured_case_by_case_and_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rulings, "EXPERIMENTS", simulated(0.2, 0.02))
    *cases, pooled = rule_on(CLAIM, rounds=15)
    assert [row["case"] for row in cases] == CLAIM.cases
    assert pooled["case"] is None and pooled["verdict"] == "confirmed"
    assert pooled["low"] < 0.2 < pooled["high"]
    assert pooled["high"] - pooled["low"] < min(row["high"] - row["low"] for row in cases)


def test_no_difference_states_what_would_have_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rulings, "EXPERIMENTS", simulated(0.0, 0.05))
    *_, pooled = rule_on(CLAIM, rounds=15)
    assert pooled["verdict"] == "no difference"
    assert f"detectable: {pooled['detectable']:.1%}" in describe(pooled) and measured(pooled) in describe(pooled)


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def absent(claim: Claim, case: Any) -> Iterator[Any]:
        raise NotMeasurable("it takes a telescope")
        yield

    monkeypatch.setattr(rulings, "EXPERIMENTS", {"compare": absent})
    lines: list[str] = []
    record = rule([CLAIM], quick=True, report=lines.append)
    assert [(row["verdict"], row["why"]) for row in record.rows] == [("not measurable here", "it takes a telescope")]
    assert record.skipped == [{"what": CLAIM.id, "why": "it takes a telescope"}]
    assert "telescope" in lines[0]


def test_claims_name_what_there_is() -> None:
    claims = load_claims()
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.experiment in EXPERIMENTS and claim.cases, claim.id
        for call in (*claim.a.calls, *claim.b.calls):
            spec = registry()[call.kernel]
            assert call.version is None or spec.version(call.version), claim.id
            sizes = {**spec.bench[0], **claim.cases[0], **call.case}
            assert spec.cost({**sizes, "order": 0}, next(iter(spec.tolerance)))[0] > 0, claim.id


def test_collective_arms_take_their_paths() -> None:
    def nothing(x: torch.Tensor) -> None:
        pass

    reduce = AllReduce(nothing)
    assert path_called(reduce, "direct", 1024) == path_called(reduce, "measured", 1024) == "direct"
    assert path_called(reduce, "registered", 1024) is None
    reduce.add("registered", nothing, torch.zeros(4 * FIXED_BYTES, dtype=torch.uint8))
    times = {"direct": {1024: 9.0, 1 << 26: 90.0}, "registered_copy": {1024: 5.0, 1 << 26: 95.0}}
    reduce.table = PathTable(Machine((), "", "", ""), times)
    assert path_called(reduce, "registered", 1024) == "registered"
    assert path_called(reduce, "registered", 1 << 30) is None
    assert [path_called(reduce, "fixed", n) for n in (1024, FIXED_BYTES, 2 * FIXED_BYTES)] == [
        "registered_copy",
        "registered_copy",
        "direct",
    ]
    assert [path_called(reduce, "measured", n) for n in (1024, 1 << 26)] == ["registered_copy", "direct"]


def test_arms_of_the_comparison_agree() -> None:
    extension = pytest.importorskip("minisgl._C", reason="the C++ extension isn't installed")
    rng = random.Random(0)
    arms = [arm for arm in ("blockwise", "mismatch", "avx2") if _runs(extension, arm)]
    assert {"blockwise", "mismatch"} <= set(arms)
    for size in (0, 1, 7, 8, 31, 32, 33, 64, 200):
        ids = array("i", [rng.randrange(4) for _ in range(size)])
        for at in range(size):
            other = array("i", ids)
            other[at] += 1
            assert {extension.compare_by(arm, ids, other) for arm in arms} == {at}
        assert {extension.compare_by(arm, ids, ids + array("i", [0])) for arm in arms} == {size}


def _runs(extension: Any, arm: str) -> bool:
    try:
        extension.compare_ns(arm, 8, 1)
    except ValueError:
        return False
    return True


def test_comparison_is_ruled_on_without_a_gpu() -> None:
    pytest.importorskip("minisgl._C", reason="the C++ extension isn't installed")
    *_, pooled = rule_on(CLAIM, rounds=5, quick=True)
    assert pooled["verdict"] != "not measurable here" or "processor" in pooled["why"]


def test_time_in_the_tree_is_measured_within_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.llm.LLM", Idle)
    claim = next(claim for claim in load_claims() if claim.id == "critical-path")
    with EXPERIMENTS[claim.experiment](claim, claim.cases[0]) as (a, b):
        pairs = [(a(), b()), (b(), a())]
    assert pairs[0][0] - pairs[0][1] >= 2000  # microseconds that the tree slept
    assert pairs[1][1] - pairs[1][0] >= 2000


class Idle:
    """An engine whose only work is a match in a slow tree."""

    def __init__(self, *args: Any, **options: Any) -> None:
        tree = SimpleNamespace(match=lambda ids: time.sleep(0.002))
        self.engine = SimpleNamespace(scheduler=SimpleNamespace(ledger=SimpleNamespace(cache=tree)))

    def generate(self, prompts: list[list[int]], params: Any) -> None:
        assert len({tuple(ids) for ids in prompts}) == len(prompts)
        self.engine.scheduler.ledger.cache.match(prompts[0])
