"""From bodies to jobs, in this process and without an engine: nothing here gets as far."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from minisgl.config import ServerConfig
from minisgl.messages import EngineReady
from minisgl.server.app import create_app
from minisgl.server.jobs import completion_job
from minisgl.server.protocol import CompletionRequest
from minisgl.server.service import Backend, Service
from minisgl.text import ChatTemplate, GenerationDefaults, Text, Tokenizer, load_text

LIMITS = EngineReady(100, 259, "cpu", "float32")


def ask(text: Text, path: str, body: dict[str, Any]) -> httpx.Response:
    service = Service(ServerConfig(), "tiny")
    service.start(Backend(text, None, LIMITS))  # type: ignore[arg-type]

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})

    return asyncio.run(post())


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_text(tiny_model).require_tokenizer()


@pytest.mark.parametrize(("choice", "temperature"), [("model", 0.25), ("neutral", 1.0)])
def test_sampling_defaults_are_the_models_or_neutral(tokenizer: Tokenizer, choice: str, temperature: float) -> None:
    text = Text(tokenizer, None, GenerationDefaults((7,), {"temperature": 0.25, "top_k": 3}))
    service = Service(ServerConfig(sampling_defaults=choice), "tiny")
    service.start(Backend(text, None, LIMITS))  # type: ignore[arg-type]
    job = asyncio.run(completion_job(service, CompletionRequest(prompt="Hi", top_k=9)))
    assert (job.params.temperature, job.params.top_k, job.params.stop_token_ids) == (temperature, 9, (7,))


def chat(text: Text, **fields: Any) -> tuple[int, str]:
    response = ask(text, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **fields})
    return response.status_code, response.json()["error"]["message"]


def test_chat_without_a_template_is_told_what_to_do(tokenizer: Tokenizer) -> None:
    status, message = chat(Text(tokenizer, None, GenerationDefaults()))
    assert status == 400
    assert "no chat template" in message
    assert "/v1/completions" in message


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ raise_exception('only cats may ask') }}", "only cats may ask"),
        ("{{ raise_exception(messages[0].name) }}", "refuses this request"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.nothing.more }}", "no attribute 'nothing'"),
        ("{% for m in messages %}", "doesn't compile"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' * messages }}", "refuses this request"),
        ("{% for i in range(10000000) %}x{% endfor %}", "refuses this request"),
        ("{{ ''.__class__.__mro__ }}", "refuses this request"),
        ("", "the prompt is empty"),
        ("{{ messages[0].name }}", "half of a surrogate pair"),
    ],
)
def test_template_that_fails_is_an_error_of_the_request(tokenizer: Tokenizer, source: str, text: str) -> None:
    messages = [{"role": "user", "content": "Hi", "name": "\ud800"}]
    template = ChatTemplate({"default": source}, {})
    status, message = chat(Text(tokenizer, template, GenerationDefaults()), messages=messages)
    assert status == 400
    assert text in message


def test_model_without_a_tokenizer_takes_and_gives_ids_only() -> None:
    text = Text(None, None, GenerationDefaults())
    for path, body in (
        ("/v1/completions", {"prompt": "Hi"}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        response = ask(text, path, body)
        assert response.status_code == 400
        assert "this model has no tokenizer" in response.json()["error"]["message"]
