"""From a request's body to a `Job`: checked, rendered and tokenized, ready for the engine."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from minisgl.messages import EngineReady
from minisgl.server import protocol
from minisgl.server.errors import HttpError
from minisgl.server.responses import Detokenized, Tokens
from minisgl.server.service import Backend, Service
from minisgl.text import Text
from minisgl.timing import span
from minisgl.types import RequestError, SamplingParams, check_ids


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate, and how to answer."""

    id: str
    model: str
    backend: Backend
    params: SamplingParams  # resolved
    priority: int
    stream: bool
    include_usage: bool
    prompts: list[list[int]] = field(default_factory=list)
    echo: list[str] | None = None  # the text of each prompt, if it is to come before the answer

    def token_bytes(self, token_id: int) -> bytes:
        tokenizer = self.backend.text.tokenizer
        return b"" if tokenizer is None else tokenizer.token_bytes(token_id)

    def num_characters(self, token_id: int) -> int:
        """How many characters of the answer's text begin with this token."""
        tokenizer = self.backend.text.tokenizer
        if tokenizer is None or (self.params.skip_special_tokens and token_id in tokenizer.special_ids):
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes(token_id))


async def chat_job(service: Service, body: protocol.ChatCompletionRequest) -> Job:
    """Renders the chat template and tokenizes, in a thread.

    Raises:
        RequestError: the request can't be served as written.
        EngineDeadError: the server isn't ready.
    """
    job = _begin("chatcmpl", service, body)
    return _with_prompts(job, [await asyncio.to_thread(_encode, job.backend.text, body)], "messages")


async def completion_job(service: Service, body: protocol.CompletionRequest) -> Job:
    """Tokenizes prompts that are text, in a thread.

    Raises:
        RequestError, EngineDeadError: as `chat_job`.
    """
    job = _begin("cmpl", service, body)
    given: Any = body.texts_or_ids()
    text = job.backend.text
    if not isinstance(given[0], str):
        job = _with_prompts(job, given, "prompt")
        if body.echo:
            given = await asyncio.to_thread(_decode, text, given, job.params.skip_special_tokens)
    else:
        prompts = await asyncio.to_thread(_encode_texts, text, given)
        job = _with_prompts(job, prompts, "prompt")
    return replace(job, echo=given) if body.echo else job


async def tokenize(service: Service, body: protocol.TokenizeRequest) -> Tokens:
    """The ids that a prompt, or a conversation, would be generated from.

    Raises:
        RequestError, EngineDeadError: as `chat_job`.
    """
    backend = _backend(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("expected either prompt or messages", "prompt")
    ids = await asyncio.to_thread(_encode, backend.text, body)
    return Tokens(ids, len(ids), backend.limits.max_total_tokens)


async def detokenize(service: Service, body: protocol.DetokenizeRequest) -> Detokenized:
    """The text of token ids.

    Raises:
        RequestError, EngineDeadError: as `chat_job`.
    """
    backend = _backend(service, body.model)
    backend.text.require_tokenizer()
    check_ids(body.tokens, backend.limits.vocab_size, "tokens")
    [text] = await asyncio.to_thread(_decode, backend.text, [body.tokens], bool(body.skip_special_tokens))
    return Detokenized(text)


def _begin(kind: str, service: Service, body: protocol.GenerationRequest) -> Job:
    """A job without prompts; what needs no tokens is checked before time goes into making them."""
    backend = _backend(service, body.model)
    body.check_fields()
    generation, limits = backend.text.generation, backend.limits
    defaults = generation.sampling if service.config.sampling_defaults == "model" else {}
    params = body.sampling_params().resolve(defaults, generation.eos_token_ids)
    if params.max_tokens is not None and params.max_tokens > limits.max_total_tokens:
        raise _too_long(f"max_tokens is {params.max_tokens}", limits, "max_tokens")
    check_ids(params.stop_token_ids, limits.vocab_size, "stop_token_ids")
    check_ids(params.logit_bias, limits.vocab_size, "logit_bias")
    return Job(
        id=f"{kind}-{uuid.uuid4().hex}", model=service.model_name, backend=backend, params=params,
        priority=body.priority or 0, stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )  # fmt: skip


def _backend(service: Service, model: str | None) -> Backend:
    backend = service.backend()
    service.check_model(model or service.model_name)
    return backend


def _encode_texts(text: Text, prompts: list[str]) -> list[list[int]]:
    with span("tokenize"):
        return text.require_tokenizer().encode_batch(prompts)


def _encode(text: Text, body: protocol.ChatCompletionRequest | protocol.TokenizeRequest) -> list[int]:
    prompt, special = getattr(body, "prompt", None), getattr(body, "add_special_tokens", None)
    if body.messages is not None:
        with span("render template"):
            messages = [m.for_template() for m in body.messages]
            prompt = text.require_chat_template().render(messages, **body.template_options())
        special = bool(special)  # the template has written them
    with span("tokenize"):
        return text.require_tokenizer().encode(prompt or "", special is not False)


def _decode(text: Text, prompts: list[list[int]], skip_special_tokens: bool) -> list[str]:
    tokenizer = text.tokenizer
    return ["" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens) for ids in prompts]


def _with_prompts(job: Job, prompts: list[list[int]], param: str) -> Job:
    """Checks what the engine would refuse too, before a stream has begun."""
    limits = job.backend.limits
    for prompt in prompts:
        if not prompt:
            raise RequestError("the prompt is empty; at least one token is needed", param)
        if len(prompt) >= limits.max_total_tokens:
            raise _too_long(f"the prompt has {len(prompt)} tokens", limits, param)
        check_ids(prompt, limits.vocab_size, param)
    return replace(job, prompts=prompts)


def _too_long(what: str, limits: EngineReady, param: str) -> HttpError:
    text = f"{what}; prompt and answer together may have {limits.max_total_tokens} tokens"
    return HttpError(text, param, code="context_length_exceeded")
