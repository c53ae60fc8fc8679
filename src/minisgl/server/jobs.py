"""From a request's body to a `Job`: checked, rendered and tokenized, ready for the engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minisgl.messages import EngineReady
from minisgl.server.errors import ContextLengthError, NotFoundError
from minisgl.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from minisgl.server.responses import Detokenized, Tokens
from minisgl.server.service import Backend, Service
from minisgl.text import Text
from minisgl.types import RequestError, SamplingParams


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
    echo: list[str] | None = None  # the text of each prompt, if it is to come before the answer


async def chat_job(service: Service, body: ChatCompletionRequest) -> Job:
    """Renders the chat template and tokenizes, in a thread.

    Raises:
        RequestError: the request can't be served as written.
        EngineDeadError: the server isn't ready.
    """
    backend, params = _check(service, body)
    prompt = await asyncio.to_thread(_render, backend.text, body)
    return _job("chatcmpl", service, backend, body, params, [prompt], "messages")


async def completion_job(service: Service, body: CompletionRequest) -> Job:
    """Tokenizes prompts that are text, in a thread.

    Raises:
        RequestError: the request can't be served as written.
        EngineDeadError: the server isn't ready.
    """
    backend, params = _check(service, body)
    prompts: Any = body.texts_or_ids()
    texts = prompts
    if isinstance(prompts[0], str):
        prompts = await asyncio.to_thread(backend.text.require_tokenizer().encode_batch, texts)
    job = _job("cmpl", service, backend, body, params, prompts, "prompt")
    if not body.echo:
        return job
    if texts is prompts:
        texts = await asyncio.to_thread(_decode, backend.text, prompts, params.skip_special_tokens)
    return replace(job, echo=texts)


async def tokenize(service: Service, body: TokenizeRequest) -> Tokens:
    """The ids that a prompt, or a conversation, would be generated from.

    Raises:
        RequestError, EngineDeadError: as `chat_job`.
    """
    backend = _backend(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("expected either prompt or messages", "prompt")
    ids = await asyncio.to_thread(_render, backend.text, body)
    return Tokens(ids, len(ids), backend.limits.max_total_tokens)


async def detokenize(service: Service, body: DetokenizeRequest) -> Detokenized:
    """The text of token ids.

    Raises:
        RequestError, EngineDeadError: as `chat_job`.
    """
    backend = _backend(service, body.model)
    backend.text.require_tokenizer()
    _check_ids(body.tokens, backend.limits, "tokens")
    return Detokenized(
        (await asyncio.to_thread(_decode, backend.text, [body.tokens], bool(body.skip_special_tokens)))[0]
    )


def _backend(service: Service, model: str | None) -> Backend:
    backend = service.backend()
    if model not in (None, service.model_name):
        raise NotFoundError(f"the model {model!r} is not served here, only {service.model_name!r}", "model")
    return backend


def _check(service: Service, body: GenerationRequest) -> tuple[Backend, SamplingParams]:
    """What needs no tokens is checked before time goes into making them. Gives the parameters as resolved."""
    backend = _backend(service, body.model)
    body.check_fields()
    generation, limits = backend.text.generation, backend.limits
    defaults = generation.sampling if service.config.sampling_defaults == "model" else {}
    params = body.sampling_params().resolve(defaults, generation.eos_token_ids)
    if params.max_tokens is not None and params.max_tokens > limits.max_total_tokens:
        raise ContextLengthError(
            f"max_tokens is {params.max_tokens}; prompt and answer together may have {limits.max_total_tokens} tokens",
            "max_tokens",
        )
    _check_ids(params.stop_token_ids, limits, "stop_token_ids")
    _check_ids(list(params.logit_bias), limits, "logit_bias")
    return backend, params


def _render(text: Text, body: ChatCompletionRequest | TokenizeRequest) -> list[int]:
    if body.messages is None:
        assert isinstance(body, TokenizeRequest) and body.prompt is not None
        prompt, special = body.prompt, body.add_special_tokens is not False
    else:
        messages = [m.for_template() for m in body.messages]
        prompt = text.require_chat_template().render(messages, **body.template_options())
        special = bool(getattr(body, "add_special_tokens", False))
    return text.require_tokenizer().encode_batch([prompt], special)[0]


def _decode(text: Text, prompts: list[list[int]], skip_special_tokens: bool) -> list[str]:
    tokenizer = text.tokenizer
    return ["" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens) for ids in prompts]


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
    return Job(
        id=f"{kind}-{uuid.uuid4().hex}",
        model=service.model_name,
        backend=backend,
        prompts=prompts,
        params=params,
        priority=body.priority or 0,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


def _check_prompt(prompt: Sequence[int], limits: EngineReady, param: str) -> None:
    """What the engine would refuse too, found before a stream has begun."""
    if not prompt:
        raise RequestError("the prompt is empty; at least one token is needed", param)
    if len(prompt) >= limits.max_total_tokens:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; prompt and answer together may have {limits.max_total_tokens}", param
        )
    _check_ids(prompt, limits, param)


def _check_ids(ids: Sequence[int], limits: EngineReady, param: str) -> None:
    if ids and not (0 <= min(ids) and max(ids) < limits.vocab_size):
        wrong = next(t for t in ids if not 0 <= t < limits.vocab_size)
        raise RequestError(f"token id {wrong} is outside the vocabulary of {limits.vocab_size}", param)
