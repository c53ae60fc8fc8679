"""Whatever way requests take, a model split over ranks answers them as the whole model does, token for token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rank_world import PAGES, assert_gone, folder, greedy, prompt, rank_pids, start

from minisgl import LLM, SamplingParams
from minisgl.types import EngineDeadError, FinishReason, RequestError

Alone = Callable[[list[int], SamplingParams], list[int]]
PROMPT = prompt(75, 0)  # longer than a step
OTHERS = [prompt(4 + 5 * i, i + 1) for i in range(10)]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tp_model: Path) -> Alone:
    """The whole model's answer to one prompt, with nothing beside it."""
    llm = LLM(str(tp_model), **(PAGES | {"prefix_cache": False}))
    return lambda tokens, params: llm.generate(tokens, params)[0].token_ids


@pytest.fixture(
    scope="module",
    params=[(2, False), (2, True), (4, False), (4, True), pytest.param((8, True), marks=SLOW)],
    ids=lambda p: f"tp{p[0]}-lag{int(p[1])}",
)
def llm(tp_model: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    size, overlap = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISGL_CHECK_RANKS", "1")
        made = start(tp_model, size, overlap=overlap)
    with made:
        yield made
        assert made.engine.stats().num_running == 0
        made.engine.scheduler.check_integrity()
        pids, path = rank_pids(made), folder(made)
        assert len(pids) == size - 1
    assert_gone(pids, path)


def test_ranks_chunked_prompt_and_prefix_hit(llm: LLM, alone: Alone) -> None:
    expected = alone(PROMPT, greedy(24))
    first, second = (llm.generate(PROMPT, greedy(24))[0] for _ in range(2))
    assert first.token_ids == second.token_ids == expected
    assert second.num_cached >= 72 - 8


def test_ranks_mixed_batch(llm: LLM, alone: Alone) -> None:
    """Short and long prompts that come while others decode; pages for only some of them at a time."""
    params = [greedy(8 + 3 * i) for i in range(len(OTHERS))]
    expected = [alone(p, s) for p, s in zip(OTHERS, params, strict=True)]
    assert [r.token_ids for r in llm.generate(OTHERS, params)] == expected


def test_ranks_preemption(llm: LLM, alone: Alone) -> None:
    prompts, params = [prompt(60, 77), prompt(75, 78)], [greedy(70), greedy(40)]
    before = llm.engine.stats().preemptions
    answers = [r.token_ids for r in llm.generate(prompts, params)]
    assert llm.engine.stats().preemptions > before
    assert answers == [alone(p, s) for p, s in zip(prompts, params, strict=True)]


def test_ranks_abort_in_mid_stream(llm: LLM, alone: Alone) -> None:
    gone = llm.stream(OTHERS[5], greedy(100))
    for _ in range(3):
        next(gone)
    kept = llm.stream(OTHERS[6], greedy(20))
    tokens = next(kept).token_ids
    gone.close()
    for delta in kept:
        tokens = tokens + delta.token_ids
    assert tokens == alone(OTHERS[6], greedy(20))
    assert llm.generate(OTHERS[5], greedy(10))[0].token_ids == alone(OTHERS[5], greedy(100))[:10]


def test_ranks_stop_string(llm: LLM) -> None:
    text = llm.generate("Once upon a time", greedy(40))[0].text
    stop = next(c for c in text[6:] if c.isascii() and c.isprintable())
    stopped, other = llm.generate(["Once upon a time", OTHERS[3]], [greedy(40, stop=(stop,)), greedy(30)])
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
    assert len(other.token_ids) == 30


def test_ranks_stop_token_id(llm: LLM, alone: Alone) -> None:
    expected = alone(OTHERS[4], greedy(20))
    answer = llm.generate(OTHERS[4], greedy(20, stop_token_ids=(expected[9],)))[0]
    assert answer.token_ids == expected[: expected.index(expected[9]) + 1]


def test_ranks_sampling_by_seed(llm: LLM, alone: Alone) -> None:
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=16, ignore_eos=True)
    hard = replace(params, top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=4)
    answers = [r.token_ids for r in llm.generate([OTHERS[2], OTHERS[7]], [params, hard])]
    assert answers == [alone(OTHERS[2], params), alone(OTHERS[7], hard)]


def test_ranks_draw_alike_without_a_seed(llm: LLM) -> None:
    """Every rank must draw the same tokens: they would differ in their last tokens otherwise, which is checked."""
    answers = llm.generate([OTHERS[1]] * 3, SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True))
    assert len({tuple(r.token_ids) for r in answers}) == 3


def test_ranks_logprobs(llm: LLM, alone: Alone) -> None:
    [answer] = llm.generate(OTHERS[8], greedy(6, logprobs=True, top_logprobs=2, prompt_logprobs=True))
    entries = answer.completions[0].logprobs
    assert entries is not None
    assert [e.token_id for e in entries] == answer.token_ids == alone(OTHERS[8], greedy(6))
    assert all(e.top[0][1] == pytest.approx(e.logprob, abs=1e-5) and e.logprob <= 0 for e in entries)


def test_ranks_refused_request_changes_nothing(llm: LLM, alone: Alone) -> None:
    for wrong in ([[]], [10_000], prompt(400, 5)):
        with pytest.raises(RequestError):
            llm.generate(wrong, greedy(4))
    assert llm.generate(OTHERS[1], greedy(5, n=1))[0].token_ids == alone(OTHERS[1], greedy(5))


def test_ranks_of_two_engines_do_not_meet(llm: LLM, alone: Alone, tp_model: Path) -> None:
    if llm.engine.tp.size != 2:
        pytest.skip("once is enough")
    with start(tp_model, 2) as other:
        assert folder(other) != folder(llm)
        streams = [one.stream(OTHERS[i], greedy(16)) for i, one in ((3, llm), (4, other), (5, llm), (6, other))]
        found = [[t for delta in deltas for t in delta.token_ids] for deltas in streams]
    assert found == [alone(OTHERS[i], greedy(16)) for i in (3, 4, 5, 6)]
    with pytest.raises(EngineDeadError, match="closed"):
        other.generate(OTHERS[0], greedy(1))
