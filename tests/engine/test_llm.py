"""The offline API on the default model: real weights, real tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_checkpoint

from minisgl import LLM, SamplingParams
from minisgl.types import ConfigError, FinishReason, RequestError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", device="cpu", num_pages=256, max_running=8)


def test_llm_answers_a_question(llm: LLM) -> None:
    result = llm.chat(QUESTION, GREEDY)[0]
    assert "Paris" in result.text
    assert result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert result.prompt_token_ids


def test_llm_keeps_the_order_of_prompts(llm: LLM) -> None:
    prompts = ["The capital of France is", "Two plus two is", "The opposite of hot is"]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (12, 3, 7)]
    together = llm.generate(prompts, params)
    assert [r.prompt for r in together] == prompts
    assert [len(r.token_ids) for r in together] == [12, 3, 7]
    for prompt, one, result in zip(prompts, params, together, strict=True):
        assert llm.generate(prompt, one)[0].text == result.text


def test_llm_takes_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The capital of France is")
    assert llm.generate(ids, GREEDY)[0].text == llm.generate("The capital of France is", GREEDY)[0].text
    assert len(llm.generate([ids, ids[:3]], GREEDY)) == 2


def test_llm_stream_adds_up_to_the_whole(llm: LLM) -> None:
    whole = llm.chat(QUESTION, GREEDY)[0]
    deltas = list(llm.stream(QUESTION, GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason is whole.finish_reason
    assert len(deltas) > 3


def test_llm_stream_closed_early_ends_the_request(llm: LLM) -> None:
    stream = llm.stream("Once upon a time", SamplingParams(temperature=0.0, max_tokens=100))
    next(stream)
    stream.close()
    llm.generate("Hi", SamplingParams(max_tokens=1))
    stats = llm.engine.stats()
    assert stats.num_running == 0
    assert stats.num_free_pages + stats.num_evictable_pages == stats.num_pages


def test_llm_calls_may_be_nested(llm: LLM) -> None:
    expected = "".join(d.text for d in llm.stream("Once upon a time", GREEDY))
    stream = llm.stream("Once upon a time", GREEDY)
    pieces = [next(stream).text]
    llm.generate("Two plus two is", GREEDY)
    pieces += [d.text for d in stream]
    assert "".join(pieces) == expected


def test_llm_n_answers_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=12)
    first = llm.generate("My favourite food is", params)[0]
    second = llm.generate("My favourite food is", params)[0]
    texts = [c.text for c in first.completions]
    assert len(set(texts)) == 3
    assert texts == [c.text for c in second.completions]
    assert [c.index for c in first.completions] == [0, 1, 2]


def test_llm_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate("Count: 1, 2, 3,", SamplingParams(temperature=0.0, max_tokens=24))[0]
    stop = whole.text[8:11]
    cut = llm.generate("Count: 1, 2, 3,", SamplingParams(temperature=0.0, max_tokens=24, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP and cut.completions[0].stop_reason == stop


def test_llm_logprobs_come_with_every_token(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=True, top_logprobs=2)
    completion = llm.generate("The sky is", params)[0].completions[0]
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in completion.logprobs), "greedy takes the top"


def test_llm_refusals_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["fine", [10**9]], GREEDY)
    with pytest.raises(RequestError):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError):
        llm.stream("a", SamplingParams(n=2))
    assert llm.engine.stats().num_running + llm.engine.stats().num_waiting == 0
    assert not llm._inbox


def test_llm_sampling_defaults_are_the_model_s_or_neutral(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 1}')
    params = SamplingParams(temperature=5.0, ignore_eos=True, max_tokens=20, seed=1)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=20)
    of_model, neutral = (LLM(str(tmp_path), device="cpu", sampling_defaults=s) for s in ("model", "neutral"))
    expected = neutral.generate([5, 6, 7], greedy)[0].token_ids
    assert of_model.generate([5, 6, 7], params)[0].token_ids == expected
    assert neutral.generate([5, 6, 7], params)[0].token_ids != expected
    with pytest.raises(ConfigError, match="neutral"):
        LLM(str(tmp_path), sampling_defaults="none")


def test_llm_reports_cached_prompt_tokens(llm: LLM) -> None:
    prompt = "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen"
    llm.generate(prompt, GREEDY)
    assert llm.generate(prompt, GREEDY)[0].num_cached >= 16
