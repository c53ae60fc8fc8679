"""A real server over real HTTP, driven by the official openai client."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import CONTEXT, VOCAB_SIZE, A, Server, running, tiny_options, wait_until

USER = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    """A deterministic completion of 8 tokens unless told otherwise."""
    fields = {"prompt": "Once", "max_tokens": 8, "temperature": 0, **fields}
    extra = {k: fields.pop(k) for k in list(fields) if k in EXTRAS}
    return client.completions.create(model="tiny", extra_body={"ignore_eos": True, **extra}, **fields)


EXTRAS = {
    *("ignore_eos", "min_tokens", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "skip_special_tokens"),
    "priority",
}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"messages": USER, "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}, **fields}
    return client.chat.completions.create(model="tiny", **fields)


def texts(answer: Any) -> list[str]:
    return [choice.text for choice in answer.choices]


def error_of(server: Server, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    """Status and error object of a request that fails."""
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    response = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=30)
    assert set(response.json()) == {"error"}, response.text
    return response.status_code, response.json()["error"]


# -- answers -------------------------------------------------------------------------------------------------------


def test_models_lists_the_one_model(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"


def test_health_is_ok_when_ready(server: Server) -> None:
    response = server.health()
    assert response.status_code == 200
    assert response.json()["status"] == "ok"
    assert server.counts()["num_pages"] == 600


def test_chat_answers_with_usage_and_reason(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    rendered = "<|start|>user\nTell me a story.<|end|>\n<|start|>assistant\n"
    num_prompt = len(re.sub(r"<\|\w+\|>", "x", rendered))  # a special token is one token, as is a character
    assert num_prompt == answer.usage.prompt_tokens
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (8, num_prompt + 8)


def test_chat_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=40)
    chunks = list(chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert len(chunks) > 5


def test_chat_stream_ends_with_done_and_has_no_usage_unasked(server: Server) -> None:
    body = {"messages": USER, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert all("usage" not in json.loads(e) for e in events[:-1])


def test_completion_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40)
    assert whole.object == "text_completion"
    chunks = list(complete(client, max_tokens=40, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_async_clients_get_their_own_answers(server: Server, stream: bool) -> None:
    prompts = [f"{i} little pigs" for i in range(8)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        answer: Any = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=stream, extra_body={"ignore_eos": True}
        )
        if not stream:
            return str(answer.choices[0].text)
        return "".join([c.choices[0].text async for c in answer])

    async def all_of_them() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, p) for p in prompts))

    with server.client() as client:
        alone = [complete(client, prompt=p, max_tokens=24).choices[0].text for p in prompts]
    assert asyncio.run(all_of_them()) == alone


def test_completion_takes_text_token_ids_and_lists_of_both(client: openai.OpenAI) -> None:
    a, b = (complete(client, prompt=p).choices[0].text for p in ("A", "B"))
    ids = [A, A + 1]
    assert complete(client, prompt=[ids[0]]).choices[0].text == a
    assert [c.text for c in complete(client, prompt=["A", "B"]).choices] == [a, b]
    assert [c.text for c in complete(client, prompt=[[ids[1]], [ids[0]]]).choices] == [b, a]


def test_n_answers_differ_and_repeat_with_the_seed(client: openai.OpenAI) -> None:
    first = complete(client, n=3, temperature=1, seed=4, max_tokens=16)
    again = complete(client, n=3, temperature=1, seed=4, max_tokens=16)
    texts = [c.text for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [c.text for c in again.choices]
    assert first.usage.completion_tokens == 48
    assert first.usage.prompt_tokens == len("Once")


def test_n_answers_to_several_prompts_come_in_order(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=["A", "B"], n=2, temperature=1, seed=4)
    streamed = dict.fromkeys(range(4), "")
    for chunk in complete(client, prompt=["A", "B"], n=2, temperature=1, seed=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [c.text for c in answer.choices] == list(streamed.values())
    assert answer.choices[0].text == complete(client, prompt="A", temperature=1, seed=4).choices[0].text


def test_answers_without_a_seed_differ(client: openai.OpenAI) -> None:
    texts = [c.text for c in complete(client, n=3, temperature=1, max_tokens=16).choices]
    texts.append(complete(client, temperature=1, max_tokens=16).choices[0].text)
    assert len(set(texts)) == 4


def test_seeds_draw_different_answers(client: openai.OpenAI) -> None:
    texts = {complete(client, temperature=1, seed=s, max_tokens=16).choices[0].text for s in range(4)}
    assert len(texts) == 4


def test_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=40).choices[0].text
    stop = text[10:12]
    cut = text[: text.index(stop)]
    answer = complete(client, max_tokens=40, stop=[stop, "never seen"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    chunks = list(complete(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == cut
    assert answer.usage.completion_tokens < 40


def test_stop_string_frees_its_pages(server: Server, client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=40).choices[0].text
    assert complete(client, max_tokens=2000, stop=text[10:12]).choices[0].finish_reason == "stop"
    wait_until(lambda: server.counts()["num_running"] == 0)


def test_stop_token_id_ends_the_answer(client: openai.OpenAI) -> None:
    stopped = complete(client, max_tokens=5, logit_bias={str(A): 100}, stop_token_ids=[A])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.usage.completion_tokens == 1


def test_filters_that_leave_one_token_are_greedy(client: openai.OpenAI) -> None:
    greedy = texts(complete(client, max_tokens=16))
    for fields in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert texts(complete(client, max_tokens=16, temperature=1, **fields)) == greedy
    assert texts(complete(client, max_tokens=16, temperature=1, top_k=-1, seed=1)) != greedy


def test_penalties_change_the_answer(client: openai.OpenAI) -> None:
    greedy = texts(complete(client, max_tokens=40))
    for fields in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert texts(complete(client, max_tokens=40, **fields)) != greedy


def test_end_of_text_ends_the_answer_unless_ignored_or_too_early(client: openai.OpenAI) -> None:
    eos = {"logit_bias": {"256": 100}, "max_tokens": 9, "skip_special_tokens": False}
    ends = [complete(client, **eos, ignore_eos=False, min_tokens=m) for m in (0, 4)]
    assert [(e.usage.completion_tokens, e.choices[0].finish_reason) for e in ends] == [(1, "stop"), (5, "stop")]
    assert texts(complete(client, **eos)) == ["</s>" * 9]


def test_logit_bias_forces_a_token(client: openai.OpenAI) -> None:
    assert complete(client, logit_bias={str(A): 100}, max_tokens=3).choices[0].text == "AAA"


def test_chat_logprobs_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert all(math.exp(t.logprob) <= 1 for t in token.top_logprobs)
    assert b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace") == answer.choices[0].message.content


def test_chat_logprobs_come_with_a_stream(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    chunks = list(chat(client, logprobs=True, top_logprobs=1, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.bytes for t in streamed] == [t.bytes for t in whole]


def test_completion_logprobs_name_the_chosen_token_too(client: openai.OpenAI) -> None:
    lists = complete(client, logprobs=0, temperature=1, seed=3).choices[0].logprobs
    for token, logprob, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True):
        assert top == {token: logprob}


def test_completion_logprobs_are_parallel_lists(client: openai.OpenAI) -> None:
    lists = complete(client, logprobs=2).choices[0].logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == 8
    assert lists.text_offset[0] == 0
    for token, logprob, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == max(top.values()) == logprob  # greedy


def test_scores_of_a_prompt_are_those_of_its_generation(client: openai.OpenAI) -> None:
    prompt = "Prompts of several pages are cached, which scoring must not mind. "
    letters = {str(A + i): 100 for i in range(26)}  # log-probabilities are those before the bias
    said = complete(client, prompt=prompt, max_tokens=20, logprobs=2, logit_bias=letters).choices[0]
    for _ in range(2):
        scored = complete(client, prompt=prompt + said.text, max_tokens=0, echo=True, logprobs=2).choices[0].logprobs
        assert scored.tokens == list(prompt + said.text)
        assert scored.token_logprobs[0] is None
        assert scored.token_logprobs[-20:] == pytest.approx(said.logprobs.token_logprobs, abs=1e-4)
        assert scored.top_logprobs[-1] == pytest.approx(said.logprobs.top_logprobs[-1], abs=1e-4)


def test_max_tokens_defaults_to_what_is_left_of_the_context(client: openai.OpenAI) -> None:
    prompt = [1] * (CONTEXT - 20)
    answer = complete(client, prompt=prompt, max_tokens=None)
    assert answer.usage.completion_tokens == 20
    answer = complete(client, prompt=prompt, max_tokens=CONTEXT)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (20, "length")


def test_max_tokens_beyond_the_context_are_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=rf"{CONTEXT + 1}.*{CONTEXT}") as info:
        complete(client, max_tokens=CONTEXT + 1)
    assert (info.value.param, info.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError):
        chat(client, max_tokens=openai.omit, max_completion_tokens=CONTEXT + 1)


def test_max_completion_tokens_counts_in_a_chat(client: openai.OpenAI) -> None:
    assert chat(client, max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3


def test_max_tokens_zero_gives_an_empty_answer(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "length")


def test_usage_tells_cached_prompt_tokens(client: openai.OpenAI) -> None:
    prompt = "a prompt that nobody else sends, longer than two pages"
    first, second = (complete(client, prompt=prompt).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 48


def test_chat_takes_parts_roles_and_template_options(client: openai.OpenAI) -> None:
    plain = chat(client, messages=[{"role": "system", "content": "Be brief."}, *USER])
    parts = [{"type": "text", "text": "Tell me a story."}]
    other = chat(client, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert other.choices[0].message.content == plain.choices[0].message.content
    assert other.usage.prompt_tokens == plain.usage.prompt_tokens
    bare = chat(client, extra_body={"chat_template_kwargs": {"add_generation_prompt": False}})
    assert bare.usage.prompt_tokens < chat(client).usage.prompt_tokens


def test_fields_without_effect_and_unknown_ones_are_accepted(client: openai.OpenAI) -> None:
    fields = {"user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "tool_choice": "auto", "zzz": 1}
    answer = chat(client, extra_body={"ignore_eos": True, **fields}, response_format={"type": "text"})
    assert answer.choices[0].message.content == chat(client).choices[0].message.content


# -- beside the answers --------------------------------------------------------------------------------------------


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(server.url + path, json=body, timeout=30)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_tokenize_gives_the_ids_of_a_text_and_back(server: Server) -> None:
    assert post(server, "/tokenize", prompt="AB") == {"tokens": [A, A + 1], "count": 2, "max_model_len": CONTEXT}
    for text in ("", "Grüße, 🌍!", "<|start|>"):
        ids = post(server, "/tokenize", prompt=text)["tokens"]
        assert post(server, "/detokenize", tokens=ids)["prompt"] == text
    assert post(server, "/detokenize", tokens=[A, 256], skip_special_tokens=True)["prompt"] == "A"


def test_tokenize_of_a_chat_is_what_the_chat_costs(server: Server, client: openai.OpenAI) -> None:
    tokens = post(server, "/tokenize", messages=USER)
    assert tokens["count"] == chat(client).usage.prompt_tokens
    bare = post(server, "/tokenize", messages=USER, add_generation_prompt=False)
    assert bare["tokens"] == tokens["tokens"][: bare["count"]]
    assert bare["count"] < tokens["count"]


def test_abort_ends_a_stream_with_what_it_has(server: Server, client: openai.OpenAI) -> None:
    stream = iter(complete(client, max_tokens=CONTEXT - 10, n=2, stream=True))
    first = next(stream)
    assert post(server, "/abort", request_id=first.id) == {"aborted": 2}
    reasons = [c.choices[0].finish_reason for c in stream]
    assert reasons.count("abort") == 2
    assert post(server, "/abort", request_id=first.id) == {"aborted": 0}
    wait_until(lambda: server.counts()["num_running"] == 0)


def test_request_id_is_in_the_header_of_an_answer(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer._request_id == answer.id


def test_metrics_count_what_happens(server: Server, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        return {s.name + "".join(s.labels.values()): s.value for family in families for s in family.samples}

    wait_until(lambda: server.counts()["num_running"] == 0)
    before = read()
    complete(client, prompt="metrics want a prompt of some pages", max_tokens=20, n=2)
    wait_until(lambda: read()["minisgl_requests_running"] == 0)
    gained = {name: value - before.get(name, 0) for name, value in read().items()}
    assert gained["minisgl_requests_totallength"] == 2
    assert gained["minisgl_prompt_tokens_total"] == 2 * len("metrics want a prompt of some pages")
    assert gained["minisgl_output_tokens_total"] == 40
    assert gained["minisgl_time_to_first_token_seconds_count"] == 2
    assert gained["minisgl_inter_token_latency_seconds_count"] == 38
    assert gained["minisgl_inter_token_latency_seconds_sum"] > 0
    after = read()
    assert after["minisgl_requests_waiting"] == after["minisgl_kv_usage_ratio"] == 0
    assert 0 < after["minisgl_prefix_hit_ratio"] < 1
    assert after["minisgl_preemptions_total"] == server.counts()["preemptions"]


def test_priority_goes_first(tiny_model: Path) -> None:
    """One row, held by a request that lasts until the others wait."""
    with running(*tiny_options(tiny_model), "--max-running", "1") as server:
        assert asyncio.run(_order_of_waiting(server.wait_ready())) == ["high", "plain", "low"]


async def _order_of_waiting(server: Server) -> list[str]:
    order: list[str] = []
    async with server.async_client() as client:

        async def one(name: str, priority: int) -> None:
            await client.completions.create(model="tiny", prompt=[1], max_tokens=20, extra_body={"priority": priority})
            order.append(name)

        first = await client.completions.create(
            model="tiny", prompt=[1], max_tokens=CONTEXT - 10, stream=True, extra_body={"ignore_eos": True}
        )
        tasks = [asyncio.create_task(one(name, p)) for name, p in (("low", -1), ("plain", 0), ("high", 5))]
        while (counts := await asyncio.to_thread(server.counts))["num_waiting"] < 3:
            assert counts["num_running"] == 1 and not order
        await first.close()
        await asyncio.gather(*tasks)
    return order


# -- errors --------------------------------------------------------------------------------------------------------


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "temperature is -1"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"n": 0}, "n", "from 1"),
    ({"max_tokens": -5}, "max_tokens", "max_tokens is -5"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"stop": [""]}, "stop", "empty"),
    ({"stop": 5}, "stop", "valid string"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "valid integer"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stop": ["a"] * 65}, "stop", "at most 64"),
    ({"stop": "\ud800"}, "stop", "valid Unicode"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than max_tokens"),
    ({"top_k": 2**40}, "top_k", "below 2^31"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"priority": 10**30}, "priority", "less than"),
    ({"max_tokens": 10**30}, "max_tokens", "less than"),
    ({"stop_token_ids": [2**62]}, "stop_token_ids", "outside the vocabulary"),
    ({"prompt": [2**70]}, "prompt", "outside the vocabulary"),
    ({"n": 129}, "n", "to 128"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"model": "gpt-4"}, "model", "not served here"),
]


@pytest.mark.parametrize(
    ("fields", "param", "text"), BAD_FIELDS, ids=lambda v: json.dumps(v) if isinstance(v, dict) else ""
)
def test_bad_field_is_named_in_the_error(server: Server, fields: dict[str, Any], param: str, text: str) -> None:
    status, error = error_of(server, "/v1/completions", {"prompt": "x", **fields})
    assert status == (404 if param == "model" else 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert text in error["message"]


def _nested(depth: int) -> dict[str, Any]:
    return {"a": _nested(depth - 1)} if depth else {}


BAD_CHATS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "valid list"),
    ({"messages": [{"role": "pope", "content": "x"}]}, "messages", "'assistant'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools, please"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "valid string"),
    ({"messages": [None]}, "messages", "valid dictionary"),
    ({"messages": [{"role": "user", "content": "x", "zzz": _nested(900)}]}, None, "nested too deeply"),
    ({"messages": USER, "echo": True}, "echo", "not supported"),
    ({"messages": USER, "prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"messages": USER, "modalities": ["audio"]}, "modalities", "not supported"),
    ({"messages": USER, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set"),
]


@pytest.mark.parametrize(("body", "param", "text"), BAD_CHATS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_chat_is_named_in_the_error(server: Server, body: dict[str, Any], param: str | None, text: str) -> None:
    status, error = error_of(server, "/v1/chat/completions", body)
    assert (status, error["param"]) == (400, param)
    assert text in error["message"]


BAD_BODIES: list[tuple[str | bytes, str]] = [
    ("{", "not valid JSON"),
    ("[1]", "JSON object"),
    ("null", "JSON object"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"prompt": ""}', "empty"),
    ('{"prompt": []}', "prompt"),
    ('{"prompt": [[]]}', "empty"),
    ('{"prompt": [1, "a"]}', "prompt"),
    ('{"prompt": [-1]}', "outside the vocabulary"),
    (f'{{"prompt": [{VOCAB_SIZE}]}}', f"vocabulary of {VOCAB_SIZE}"),
    ('{"prompt": "x", "temperature": NaN}', "temperature is nan"),
    ('{"prompt": "x", "temperature": 1e999}', "temperature is inf"),
    ('{"prompt": "x", "temperature": -Infinity}', "temperature is -inf"),
    ('{"prompt": "x", "logit_bias": {"1": NaN}}', "{1: nan}"),
    ('{"prompt": "x", "max_tokens": ' + "9" * 5000 + "}", "4300 digits"),
    ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", "recursion"),
    ('{"prompt": "x", "zzz": ' + '{"a":' * 200_000 + "1" + "}" * 200_000 + "}", "recursion"),
    (b'{"prompt": "\xff"}', "can't decode byte"),
    (b"\xff\xfe{}", "not valid JSON"),
    ("", "JSON object"),
    (f'{{"prompt": "x", "logit_bias": {{"{VOCAB_SIZE}": 1}}}}', "vocabulary"),
    (f'{{"prompt": "x", "stream": true, "logit_bias": {{"{VOCAB_SIZE}": 1}}}}', "vocabulary"),
]


@pytest.mark.parametrize(("body", "text"), BAD_BODIES, ids=lambda v: str(v)[:40])
def test_bad_body_gets_an_error_and_hurts_nobody(server: Server, body: str | bytes, text: str) -> None:
    status, error = error_of(server, "/v1/completions", body)
    assert status == 400
    assert text in error["message"]
    assert server.health().status_code == 200


def test_too_long_a_prompt_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        complete(client, prompt=[1] * (CONTEXT + 5), stream=True)
    assert str(CONTEXT + 5) in info.value.message
    assert str(CONTEXT) in info.value.message
    assert (info.value.param, info.value.code) == ("prompt", "context_length_exceeded")


def test_a_bad_prompt_among_good_ones_refuses_them_all(server: Server) -> None:
    assert error_of(server, "/v1/completions", {"prompt": [[1], [VOCAB_SIZE]]})[0] == 400
    wait_until(lambda: server.counts()["num_running"] == 0)


def test_unknown_paths_and_methods_are_openai_errors(server: Server) -> None:
    assert error_of(server, "/v1/nothing", {})[0] == 404
    response = httpx.get(f"{server.url}/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt-4")


# -- clients that go away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_disconnects_frees_its_pages(server: Server, stream: bool) -> None:
    wait_until(lambda: server.counts()["num_running"] == 0)
    before = server.counts()
    body = {"prompt": "Once", "max_tokens": CONTEXT - 10, "ignore_eos": True, "stream": stream}

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            request = asyncio.create_task(_read_some(http, f"{server.url}/v1/completions", body))
            while server.counts()["output_tokens"] < before["output_tokens"] + 20:
                await asyncio.sleep(0.01)
            request.cancel()

    asyncio.run(leave())
    wait_until(lambda: server.counts()["num_running"] == 0)
    after = server.counts()
    assert after["output_tokens"] - before["output_tokens"] < CONTEXT // 2  # it didn't just run to its end
    free = after["num_free_pages"] + after["num_evictable_pages"]
    assert free == after["num_pages"]
    assert server.health().json().get("open_requests", 0) == 0


async def _read_some(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    async with http.stream("POST", url, json=body) as response:
        async for _ in response.aiter_lines():
            pass


def test_slow_reader_holds_back_nobody_and_loses_nothing(server: Server, client: openai.OpenAI) -> None:
    slow = iter(complete(client, max_tokens=1000, stream=True, stream_options={"include_usage": True}))
    next(slow)
    with server.client() as other:
        assert complete(other, max_tokens=40).usage.completion_tokens == 40
    wait_until(lambda: server.counts()["num_running"] == 0)
    *_, last = slow
    assert last.usage.completion_tokens == 1000
