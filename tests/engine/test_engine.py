"""What the engine does with requests beyond greedy tokens: ends, limits, errors, seeds, log-probabilities."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import GREEDY, Driver
from tiny import greedy, make_checkpoint

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.types import ConfigError, FinishReason, ModelError, RequestError, SamplingParams

PROMPT = [5, 9, 33, 12, 60, 21, 7]
LAGS = pytest.mark.parametrize("overlap", [False, True], ids=["lag0", "lag1"])


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_checkpoint("llama", folder)


@pytest.fixture(scope="module")
def folder(oracle: tuple[Path, object]) -> Path:
    return oracle[0]


@LAGS
def test_engine_ends_at_any_stop_token(oracle: tuple[Path, object], overlap: bool) -> None:
    folder, model = oracle
    full = greedy(model, PROMPT, 20)
    driver = Driver(folder, overlap=overlap)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    answer = driver.answers[driver.add(PROMPT, params, eos=(full[6], full[9]))]
    driver.run()
    assert answer.finish is FinishReason.STOP
    assert answer.tokens == full[: min(full.index(full[6]), full.index(full[9])) + 1]
    driver.close()


@LAGS
def test_engine_ends_at_max_tokens_and_at_the_context(folder: Path, overlap: bool) -> None:
    driver = Driver(folder, overlap=overlap, max_model_len=24)
    assert len(driver.ask(PROMPT, replace(GREEDY, max_tokens=5)).tokens) == 5
    answer = driver.ask(PROMPT)
    assert (len(answer.tokens), answer.finish) == (24 - len(PROMPT), FinishReason.LENGTH)
    answer = driver.ask(PROMPT, replace(GREEDY, max_tokens=0))
    assert (answer.tokens, answer.finish) == ([], FinishReason.LENGTH)


@LAGS
def test_engine_min_tokens_holds_the_end_back(oracle: tuple[Path, object], overlap: bool) -> None:
    folder, model = oracle
    first = greedy(model, PROMPT, 1)[0]
    driver = Driver(folder, overlap=overlap)
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=6, stop_token_ids=(first,))
    answer = driver.ask(PROMPT, params)
    assert first not in answer.tokens[:6] and len(answer.tokens) >= 6


@LAGS
def test_engine_abort_frees_everything_within_a_step(folder: Path, overlap: bool) -> None:
    driver = Driver(folder, overlap=overlap)
    ids = [driver.add(PROMPT + [i], GREEDY) for i in range(4)]
    for _ in range(5):
        driver.step()
    count = len(driver.answers[ids[1]].tokens)
    driver.engine.abort(ids[1])
    driver.engine.finish(ids[2])
    driver.step()
    stats = driver.engine.stats()
    assert stats.num_running == 2
    assert driver.answers[ids[1]].finish is FinishReason.ABORT
    assert len(driver.answers[ids[1]].tokens) == count, "nothing came after the abort"
    assert driver.answers[ids[2]].finish is None, "who ends it at a stop string says so himself"
    for id in (ids[0], ids[3]):
        driver.engine.abort(id)
    driver.run()
    driver.close()


def test_engine_refuses_what_it_can_t_serve(folder: Path) -> None:
    driver = Driver(folder, num_pages=4)
    for prompt, params, text in (
        ([], GREEDY, "empty"),
        ([101], GREEDY, "prompt has token id 101, which is outside the vocabulary of 101"),
        ([-1], GREEDY, "token id -1"),
        ([1] * 64, GREEDY, "64 tokens.*64"),
        ([1], replace(GREEDY, logit_bias={400: 1.0}), "logit_bias has token id 400"),
        ([1], replace(GREEDY, stop_token_ids=(101,)), "stop_token_ids"),
    ):
        with pytest.raises(RequestError, match=text):
            driver.add(prompt, params)
    assert not driver.engine.has_work


def test_engine_refuses_configurations_that_can_t_run(folder: Path) -> None:
    for options, text in (
        ({"max_batched_tokens": 4, "max_running": 8}, "max-batched-tokens is 4"),
        ({"max_model_len": 10_000}, "context has 512"),
        ({"attention": "magic"}, "torch_sdpa"),
        ({"page_size": 0}, "page-size is 0"),
        ({"tp_size": 2}, "tp"),
    ):
        with pytest.raises((ConfigError, ModelError), match=text):
            Engine(EngineConfig(model=str(folder), device="cpu", **options))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cpu"):
            Engine(EngineConfig(model=str(folder), device="cuda"))


@LAGS
def test_engine_seed_fixes_the_answer_whatever_the_batch(folder: Path, overlap: bool) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=42, max_tokens=24, ignore_eos=True)
    alone = Driver(folder, overlap=False).ask(PROMPT, params).tokens
    driver = Driver(folder, overlap=overlap)
    for i in range(3):
        driver.add(PROMPT + [i], replace(params, seed=i))
    answer = driver.ask(PROMPT, params)
    assert answer.tokens == alone
    assert driver.ask(PROMPT, replace(params, seed=43)).tokens != alone


@LAGS
def test_engine_penalties_count_tokens_in_flight(folder: Path, overlap: bool) -> None:
    """With overlap the host learns a token a step late; the penalty must not."""
    params = replace(GREEDY, max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.5)
    plain = Driver(folder, overlap=False).ask(PROMPT, params).tokens
    assert Driver(folder, overlap=overlap).ask(PROMPT, params).tokens == plain
    without = Driver(folder, overlap=False).ask(PROMPT, replace(GREEDY, max_tokens=40)).tokens
    assert len(set(plain)) > len(set(without))


@LAGS
def test_engine_penalties_survive_preemption(folder: Path, overlap: bool) -> None:
    params = replace(GREEDY, max_tokens=40, frequency_penalty=1.5)
    expected = Driver(folder).ask(PROMPT, params).tokens
    driver = Driver(folder, overlap=overlap, page_size=4, num_pages=20)
    driver.add(PROMPT[::-1], replace(GREEDY, max_tokens=60))
    ours = driver.add(PROMPT, params)
    request = driver.engine.scheduler.requests[ours]
    driver.run()
    assert request.num_preemptions > 0
    assert driver.answers[ours].tokens == expected


@LAGS
def test_engine_logprobs_are_those_of_the_model(oracle: tuple[Path, object], overlap: bool) -> None:
    folder, model = oracle
    driver = Driver(folder, overlap=overlap)
    driver.add(PROMPT[:3], GREEDY)  # one beside it that wants none
    answer = driver.answers[driver.add(PROMPT, replace(GREEDY, max_tokens=6, logprobs=True, top_logprobs=3))]
    while answer.finish is None:
        driver.step()
    got = [output.logprobs[0] for output in answer.outputs]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + answer.tokens])).logits[0, len(PROMPT) - 1 : -1]
    reference = logits.log_softmax(-1)
    assert [entry.token_id for entry in got] == answer.tokens
    for entry, row in zip(got, reference, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [id for id, _ in entry.top] == row.topk(3).indices.tolist()


@LAGS
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_engine_prompt_logprobs_are_those_of_the_model(
    oracle: tuple[Path, object], overlap: bool, max_tokens: int
) -> None:
    """In chunks, beside others, and with the prompt in the cache already."""
    folder, model = oracle
    prompt = PROMPT * 6
    driver = Driver(folder, overlap=overlap, page_size=4, max_batched_tokens=20)
    driver.ask(prompt, replace(GREEDY, max_tokens=2))
    driver.add(PROMPT[:3], replace(GREEDY, max_tokens=30))
    answer = driver.ask(prompt, replace(GREEDY, max_tokens=max_tokens, prompt_logprobs=True, top_logprobs=2))
    assert (len(answer.tokens), answer.finish, answer.num_cached) == (max_tokens, FinishReason.LENGTH, 0)
    entries = answer.outputs[0].prompt_logprobs
    assert not any(output.prompt_logprobs for output in answer.outputs[1:])
    with torch.no_grad():
        reference = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in entries] == prompt[1:]
    for entry, row in zip(entries, reference, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [id for id, _ in entry.top] == row.topk(2).indices.tolist()
    assert not driver.engine.runner.prompt_logprobs
    assert driver.engine.stats().output_tokens == sum(len(a.tokens) for a in driver.answers.values())


@LAGS
def test_engine_prompt_logprobs_of_one_token_are_none(folder: Path, overlap: bool) -> None:
    driver = Driver(folder, overlap=overlap)
    alone = driver.ask([5], replace(GREEDY, max_tokens=0, prompt_logprobs=True))
    driver.add(PROMPT, replace(GREEDY, max_tokens=4, logprobs=True))
    beside = driver.ask([5], replace(GREEDY, max_tokens=2, prompt_logprobs=True))
    assert (alone.tokens, len(beside.tokens)) == ([], 2)
    assert not any(o.prompt_logprobs for a in (alone, beside) for o in a.outputs)
    driver.run()
    assert not driver.engine.runner.prompt_logprobs


@LAGS
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_engine_keeps_no_prompt_logprobs_of_an_abort(folder: Path, overlap: bool, steps: int) -> None:
    driver = Driver(folder, overlap=overlap, max_batched_tokens=20)
    id = driver.add(PROMPT * 6, replace(GREEDY, max_tokens=2, prompt_logprobs=True))
    for _ in range(steps):
        driver.step()
    driver.engine.abort(id)
    driver.run()
    assert driver.answers[id].finish is FinishReason.ABORT
    assert not driver.engine.runner.prompt_logprobs


@LAGS
def test_engine_sends_prompt_logprobs_once_though_preempted(folder: Path, overlap: bool) -> None:
    driver = Driver(folder, overlap=overlap, page_size=4, num_pages=14)
    ids = [driver.add(PROMPT, replace(GREEDY, max_tokens=30, prompt_logprobs=True)) for _ in range(3)]
    driver.run()
    assert driver.engine.stats().preemptions > 0
    for id in ids:
        assert [len(o.prompt_logprobs) for o in driver.answers[id].outputs] == [len(PROMPT) - 1] + 29 * [0]
    assert not driver.engine.runner.prompt_logprobs


def test_engine_priority_decides_who_waits(folder: Path) -> None:
    driver = Driver(folder, max_running=1)
    low = driver.add(PROMPT, replace(GREEDY, max_tokens=3), priority=-1)
    high = driver.add(PROMPT, replace(GREEDY, max_tokens=3), priority=5)
    while driver.answers[high].finish is None:
        driver.step()
        assert not driver.answers[low].tokens
    driver.run()
    assert len(driver.answers[low].tokens) == 3


def test_engine_stats_count_what_happened(folder: Path) -> None:
    driver = Driver(folder, page_size=4)
    driver.ask(PROMPT * 3, replace(GREEDY, max_tokens=5))
    driver.ask(PROMPT * 3, replace(GREEDY, max_tokens=5))
    stats = driver.engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (42, 20, 10)
    assert stats.num_running == stats.num_waiting == 0


def test_engine_without_prefix_cache_recomputes(folder: Path) -> None:
    driver = Driver(folder, prefix_cache=False)
    first = driver.ask(PROMPT * 4, replace(GREEDY, max_tokens=5))
    second = driver.ask(PROMPT * 4, replace(GREEDY, max_tokens=5))
    assert first.tokens == second.tokens and second.num_cached == 0
    assert driver.engine.stats().num_free_pages == driver.engine.stats().num_pages


def test_engine_dummy_weights_need_only_a_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    answers = [Driver(tmp_path, dummy_weights=True, seed=s).ask(PROMPT, replace(GREEDY, max_tokens=8)) for s in (1, 1)]
    assert answers[0].tokens == answers[1].tokens
    with pytest.raises(ModelError):
        Driver(tmp_path)


def test_engine_copies_the_prompt(folder: Path) -> None:
    driver = Driver(folder)
    prompt = array("i", PROMPT)
    driver.engine.add("x", prompt, GREEDY.resolve({}, []))
    assert list(prompt) == PROMPT and driver.engine.scheduler.requests["x"].tokens is not prompt
