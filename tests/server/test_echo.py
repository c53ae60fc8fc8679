"""`echo` and log-probabilities of prompts: what scoring clients such as lm-eval ask for."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from servers import KEY, A, Server


@pytest.fixture(scope="module")
def client(fake: Server) -> openai.OpenAI:
    return fake.client(KEY)


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"prompt": "ABC", "max_tokens": 2, "echo": True, "logprobs": 1, **fields}
    return client.completions.create(model="tiny", **fields)


def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=None)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("ABCAB", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    assert complete(client, echo=False, logprobs=None).choices[0].text == "AB"


def test_echo_with_logprobs_has_those_of_the_prompt(client: openai.OpenAI) -> None:
    lists = complete(client).choices[0].logprobs
    assert lists.tokens == ["A", "B", "C", "A", "B"]
    a, b, c = (-(A + i) / 8 for i in range(3))
    assert lists.token_logprobs == [None, b, c, a, b]
    assert lists.top_logprobs == [None, {"!": 0, "B": b}, {"!": 0, "C": c}, {"!": 0, "A": a}, {"!": 0, "B": b}]
    assert lists.text_offset == [0, 1, 2, 3, 4]


def test_logprobs_without_echo_are_the_answers_alone(client: openai.OpenAI) -> None:
    assert complete(client, echo=False).choices[0].logprobs.tokens == ["A", "B"]


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_zero_scores_and_generates_nothing(client: openai.OpenAI, stream: bool) -> None:
    answer = complete(client, max_tokens=0, stream=stream)
    [choice] = next(iter(answer)).choices if stream else answer.choices
    assert (choice.text, choice.finish_reason) == ("ABC", "length")
    assert choice.logprobs.token_logprobs == [None, -(A + 1) / 8, -(A + 2) / 8]
    if not stream:
        assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("prompt", ["ABC", [A, A + 1, A + 2], ["AB", "CDE"], [[A], [A + 1, A + 2]]])
def test_echo_streams_what_it_answers_whole(client: openai.OpenAI, prompt: Any) -> None:
    whole = complete(client, prompt=prompt, n=2, seed=1, max_tokens=3)
    texts = [""] * len(whole.choices)
    offsets: list[list[int]] = [[] for _ in whole.choices]
    scores: list[list[float | None]] = [[] for _ in whole.choices]
    for chunk in complete(client, prompt=prompt, n=2, seed=1, max_tokens=3, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset
        scores[choice.index] += choice.logprobs.token_logprobs
    assert texts == [c.text for c in whole.choices]
    assert offsets == [c.logprobs.text_offset for c in whole.choices]
    assert scores == [c.logprobs.token_logprobs for c in whole.choices]
    for choice in whole.choices:
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert choice.text[offset:].startswith(token)


def test_echo_leaves_out_special_tokens_unless_told(client: openai.OpenAI) -> None:
    prompt = [257, A, 258, A]  # <|start|>A<|end|>A
    answer = complete(client, prompt=prompt, max_tokens=0).choices[0]
    assert (answer.text, answer.logprobs.text_offset) == ("AA", [0, 0, 1, 1])
    options = {"skip_special_tokens": False}
    answer = complete(client, prompt=prompt, max_tokens=0, extra_body=options).choices[0]
    assert (answer.text, answer.logprobs.text_offset) == ("<|start|>A<|end|>A", [0, 9, 10, 17])


def test_offsets_count_characters_not_bytes(client: openai.OpenAI) -> None:
    answer = complete(client, prompt="é€A", max_tokens=0).choices[0]
    assert answer.text == "é€A"
    assert answer.logprobs.text_offset == [0, 1, 1, 2, 2, 2]
    assert answer.logprobs.tokens[0] == "bytes:\\xc3"
