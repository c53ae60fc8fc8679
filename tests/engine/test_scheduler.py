"""The scheduler's behaviours, one by one, over the arithmetic model of `simulation`."""

from __future__ import annotations

import pytest
from simulation import Simulation, expected_output

from minisgl.engine.scheduler import MAX_BYPASS
from minisgl.types import FinishReason, RequestError

LAGS = pytest.mark.parametrize("lag", [0, 1])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + i * 7) % 50 for i in range(length)]


@LAGS
@pytest.mark.parametrize("budget", [4, 7, 64])
def test_scheduler_splits_long_prompts_into_chunks(lag: int, budget: int) -> None:
    sim = Simulation(64, 4, lag, max_batched_tokens=budget)
    sim.add("a", prompt_of(50), 20)
    sim.run()
    assert sim.output["a"] == expected_output(prompt_of(50), 20)
    assert sim.max_chunk == min(budget, 50)


@LAGS
def test_scheduler_mixes_decodes_with_chunks(lag: int) -> None:
    sim = Simulation(64, 4, lag, max_batched_tokens=8)
    sim.add("a", prompt_of(4), 20)
    sim.step()
    sim.add("b", prompt_of(40, 1), 5)
    sim.run()
    assert sim.num_mixed >= 4
    assert sim.output["a"] == expected_output(prompt_of(4), 20)
    assert sim.output["b"] == expected_output(prompt_of(40, 1), 5)


@LAGS
def test_scheduler_serves_a_known_prefix_from_the_cache(lag: int) -> None:
    sim = Simulation(64, 4, lag)
    sim.add("a", prompt_of(33), 4)
    sim.run()
    second = sim.add("b", prompt_of(33) + [1, 2, 3], 4)
    sim.run()
    assert second.num_cached == 32
    assert sim.output["b"] == expected_output(prompt_of(33) + [1, 2, 3], 4)


@LAGS
def test_scheduler_never_takes_a_whole_prompt_from_the_cache(lag: int) -> None:
    sim = Simulation(64, 4, lag)
    for id in ("a", "b"):
        request = sim.add(id, prompt_of(32), 4)
        sim.run()
    assert request.num_cached == 28
    assert sim.output["b"] == expected_output(prompt_of(32), 4)


@LAGS
def test_scheduler_preempts_the_newest_and_resumes_it(lag: int) -> None:
    sim = Simulation(12, 4, lag, max_batched_tokens=64)
    requests = [sim.add(f"r{i}", prompt_of(10, i), 25) for i in range(3)]
    sim.run()
    assert sim.scheduler.preemptions > 0
    assert requests[0].num_preemptions == 0, "the oldest is never preempted"
    for i in range(3):
        assert sim.output[f"r{i}"] == expected_output(prompt_of(10, i), 25)


@LAGS
def test_scheduler_preempts_lower_priority_first(lag: int) -> None:
    sim = Simulation(12, 4, lag, max_batched_tokens=64)
    old = sim.add("old", prompt_of(10, 0), 25, priority=0)
    new = sim.add("new", prompt_of(10, 1), 25, priority=1)
    sim.run()
    assert (old.num_preemptions > 0, new.num_preemptions) == (True, 0)


@LAGS
def test_scheduler_lets_a_lone_request_use_the_whole_pool(lag: int) -> None:
    sim = Simulation(8, 4, lag)
    sim.add("before", prompt_of(20, 3), 5)
    sim.run()
    request = sim.add("a", prompt_of(20), 1000)
    assert request.max_total == 32
    sim.run()
    assert sim.output["a"] == expected_output(prompt_of(20), 12)
    assert sim.ended["a"] is FinishReason.LENGTH


@LAGS
def test_scheduler_shares_a_prefix_computed_twice_without_holding_both(lag: int) -> None:
    """Two requests compute the same prompt in one step; when the pool gets tight, the lone survivor still fits."""
    sim = Simulation(10, 4, lag, max_batched_tokens=64)
    sim.add("a", prompt_of(16), 1)
    survivor = sim.add("b", prompt_of(16), 24)
    sim.run()
    assert survivor.max_total == 40
    assert sim.output["b"] == expected_output(prompt_of(16), 24)


@LAGS
def test_scheduler_stops_at_a_stop_token(lag: int) -> None:
    full = expected_output(prompt_of(9), 30)
    stop = full[12]
    sim = Simulation(64, 4, lag)
    sim.add("a", prompt_of(9), 30, (stop,))
    sim.run()
    assert sim.output["a"] == full[: full.index(stop) + 1]
    assert sim.ended["a"] is FinishReason.STOP


def test_scheduler_drops_tokens_in_flight_for_an_ended_request() -> None:
    sim = Simulation(64, 4, 1)
    sim.add("a", prompt_of(9), 30)
    for _ in range(3):
        sim.step()
    count = len(sim.output["a"])
    assert sim.in_flight
    sim.finish("a", FinishReason.ABORT)
    assert sim.scheduler.ledger.deferred, "its pages wait for the step in flight"
    sim.run()
    assert len(sim.output["a"]) == count
    assert not sim.scheduler.ledger.deferred


@LAGS
def test_scheduler_admits_smaller_requests_past_a_blocked_head(lag: int) -> None:
    sim = Simulation(10, 4, lag, max_batched_tokens=64)
    sim.add("running", prompt_of(16), 12)
    sim.step()
    sim.add("large", prompt_of(30, 1), 2)
    sim.add("small", prompt_of(4, 2), 2)
    sim.run()
    assert list(sim.ended) == ["small", "running", "large"]


@LAGS
def test_scheduler_doesn_t_starve_a_blocked_head(lag: int) -> None:
    """A request as large as the pool waits while small ones keep coming, more than there is room for."""
    sim = Simulation(32, 4, lag, max_batched_tokens=64, max_running=8)
    for i in range(8):
        sim.add(f"early{i}", prompt_of(5, i), 8 + i)
    sim.step()
    sim.add("large", prompt_of(110, 1), 2)
    for i in range(4 * MAX_BYPASS):
        sim.add(f"small{i}", prompt_of(5, i), 8)
        sim.add(f"other{i}", prompt_of(5, i + 7), 8)
        sim.step()
    assert "large" in sim.ended
    assert len(sim.ended) > MAX_BYPASS, "small ones did pass"
    assert sim.output["large"] == expected_output(prompt_of(110, 1), 2)


def test_scheduler_orders_by_priority_then_arrival() -> None:
    sim = Simulation(64, 4, 0, max_running=1)
    for id, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        sim.add(id, prompt_of(5), 2, priority=priority)
    sim.run()
    assert list(sim.ended) == ["b", "d", "a", "c"]


def test_scheduler_policy_lpm_prefers_cached_prompts() -> None:
    sim = Simulation(64, 4, 0, max_running=1, policy="lpm")
    sim.add("warm", prompt_of(20), 2)
    sim.run()
    sim.add("cold", prompt_of(20, 5), 2)
    sim.add("hit", prompt_of(20) + [9], 2)
    sim.run()
    assert list(sim.ended) == ["warm", "hit", "cold"]


def test_scheduler_refuses_what_can_never_fit() -> None:
    sim = Simulation(8, 4, 0)
    with pytest.raises(RequestError, match=r"40 tokens.*32"):
        sim.add("a", prompt_of(40), 1)
    with pytest.raises(RequestError, match="empty"):
        sim.add("b", [], 1)
    sim.add("c", prompt_of(4), 1)
    with pytest.raises(RequestError, match="running already"):
        sim.add("c", prompt_of(4), 1)


@LAGS
def test_scheduler_works_without_a_prefix_cache(lag: int) -> None:
    sim = Simulation(12, 4, lag, prefix_cache=False, max_batched_tokens=64)
    for i in range(3):
        sim.add(f"r{i}", prompt_of(10), 25)
    sim.run()
    assert sim.scheduler.preemptions > 0
    assert sim.scheduler.cached_tokens == 0
    assert all(sim.output[f"r{i}"] == expected_output(prompt_of(10), 25) for i in range(3))


def test_scheduler_keeps_the_token_in_flight_of_a_preempted_request() -> None:
    sim = Simulation(12, 4, 1, max_batched_tokens=64)
    for i in range(3):
        sim.add(f"r{i}", prompt_of(10, i), 25)
    sim.run()
    assert sim.num_preempted_in_flight > 0
    for i in range(3):
        assert sim.output[f"r{i}"] == expected_output(prompt_of(10, i), 25)
