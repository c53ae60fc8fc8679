"""Random histories: whatever happens in whatever order, pages are accounted for and answers are right."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from simulation import Simulation, expected_output

from minisgl.types import FinishReason

PREFIXES = [[(i * 7 + k) % 50 for i in range(24)] for k in range(3)]


class EngineHistory(RuleBasedStateMachine):
    """Requests come, run, stop, are aborted and preempted, in a pool that is too small for them."""

    @initialize(
        lag=st.sampled_from([0, 1]),
        page_size=st.sampled_from([1, 2, 4]),
        tokens=st.integers(16, 64),
        budget=st.integers(4, 24),
        policy=st.sampled_from(["fcfs", "lpm"]),
        prefix_cache=st.booleans(),
    )
    def start(self, lag: int, page_size: int, tokens: int, budget: int, policy: str, prefix_cache: bool) -> None:
        pages = tokens // page_size
        self.sim = Simulation(
            pages, page_size, lag, max_batched_tokens=budget, policy=policy, prefix_cache=prefix_cache
        )
        self.wanted: dict[str, tuple[list[int], int, tuple[int, ...]]] = {}
        self.cut: set[str] = set()  # ended from outside: what they got so far must still be right

    @rule(
        prefix=st.sampled_from(PREFIXES),
        length=st.integers(0, 24),
        tail=st.lists(st.integers(0, 49), max_size=6),
        max_tokens=st.integers(1, 20),
        stop=st.lists(st.integers(0, 49), max_size=3),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def add(
        self, prefix: list[int], length: int, tail: list[int], max_tokens: int, stop: list[int], priority: int
    ) -> None:
        prompt = (prefix[:length] + tail or [1])[: self.sim.scheduler.max_total_tokens - 1]
        id = f"r{len(self.wanted)}"
        self.wanted[id] = (prompt, max_tokens, tuple(stop))
        self.sim.add(id, prompt, max_tokens, tuple(stop), priority)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.sim.step()

    @precondition(lambda self: self.sim.scheduler.requests)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        id = data.draw(st.sampled_from(sorted(self.sim.scheduler.requests)))
        self.sim.finish(id, reason)
        self.cut.add(id)

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        self.sim.run(limit=5_000)  # or somebody starves
        assert self.sim.ended.keys() == self.wanted.keys(), "every request ends exactly once"
        for id, (prompt, max_tokens, stop) in self.wanted.items():
            limit = min(max_tokens, self.sim.scheduler.max_total_tokens - len(prompt))
            expected = expected_output(prompt, limit, stop)
            output = self.sim.output[id]
            assert output == (expected[: len(output)] if id in self.cut else expected)
        ledger = self.sim.scheduler.ledger
        assert not ledger.deferred
        assert len(ledger.free) + (ledger.cache.num_evictable_pages if ledger.cache else 0) == ledger.num_pages


def test_scheduler_survives_random_histories() -> None:
    run_state_machine_as_test(
        EngineHistory,
        settings=settings(
            max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
