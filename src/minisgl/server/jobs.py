"""From a request's body to a `Job`: checked, rendered and tokenized, ready for the engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minisgl.messages import EngineReady
from minisgl.server.errors import NotFoundError
from minisgl.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from minisgl.server.service import Backend, Service
from minisgl.text import Text
from minisgl.types import RequestError, SamplingParams

_RESERVED = {"messages", "tools"}  # variables of a chat template that have fields of their own


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate, and how to answer."""

    id: str
    model: str
    backend: Backend
    prompts: list[list[int]]
    params: SamplingParams  # resolved
    priority: int
    stream: bool
    include_usage: bool


async def chat_job(service: Service, body: ChatCompletionRequest) -> Job:
    """Renders the chat template and tokenizes, in a thread.

    Raises:
        RequestError: the request can't be served as written.
        EngineDeadError: the server isn't ready.
    """
    backend = _check(service, body)
    params = body.sampling_params()
    text, messages = backend.text, [m.for_template() for m in body.messages]
    template, options = text.require_chat_template(), body.chat_template_kwargs or {}
    if options.keys() & _RESERVED:
        raise RequestError(f"chat_template_kwargs may not set {' or '.join(sorted(_RESERVED))}", "chat_template_kwargs")
    options = {"add_generation_prompt": body.add_generation_prompt, **options}

    def render() -> list[list[int]]:
        return _encode(text, [template.render(messages, **options)], add_special_tokens=False)

    return _job("chatcmpl", service, backend, body, params, await asyncio.to_thread(render), "messages")


async def completion_job(service: Service, body: CompletionRequest) -> Job:
    """Tokenizes prompts that are text, in a thread.

    Raises:
        RequestError: the request can't be served as written.
        EngineDeadError: the server isn't ready.
    """
    backend = _check(service, body)
    params = body.sampling_params()
    prompts: Any = body.texts_or_ids()
    if isinstance(prompts[0], str):
        prompts = await asyncio.to_thread(_encode, backend.text, prompts, True)
    return _job("cmpl", service, backend, body, params, prompts, "prompt")


def _check(service: Service, body: GenerationRequest) -> Backend:
    backend = service.backend()
    body.check_fields()
    if body.model not in (None, service.model_name):
        raise NotFoundError(f"the model {body.model!r} is not served here, only {service.model_name!r}", "model")
    return backend


def _encode(text: Text, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    return text.require_tokenizer().encode_batch(texts, add_special_tokens)


def _job(
    kind: str,
    service: Service,
    backend: Backend,
    body: GenerationRequest,
    params: SamplingParams,
    prompts: list[list[int]],
    param: str,
) -> Job:
    for prompt in prompts:
        _check_prompt(prompt, backend.limits, param)
    generation = backend.text.generation
    return Job(
        id=f"{kind}-{uuid.uuid4().hex}",
        model=service.model_name,
        backend=backend,
        prompts=prompts,
        params=params.resolve(generation.sampling, generation.eos_token_ids),
        priority=body.priority or 0,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


def _check_prompt(prompt: Sequence[int], limits: EngineReady, param: str) -> None:
    """What the engine would refuse too, found before a stream has begun."""
    if not prompt:
        raise RequestError("the prompt is empty; at least one token is needed", param)
    if len(prompt) >= limits.max_total_tokens:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; prompt and answer together may have {limits.max_total_tokens}", param
        )
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        wrong = next(t for t in prompt if not 0 <= t < limits.vocab_size)
        raise RequestError(f"token id {wrong} is outside the vocabulary of {limits.vocab_size}", param)
