"""What clients send: the OpenAI request schemas and the sampling extras that other engines have too."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from minisgl.types import RequestError, SamplingParams

logger = logging.getLogger(__name__)

_SAMPLING_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
_MAX_WARNINGS = 100  # clients choose the names

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what a message to the engine can hold

# Fields that aren't supported, each with the test of whether its value asks for something.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("audio", "echo", "functions", "guided_json", "prediction", "suffix", "tools"), bool),
    "best_of": lambda v: v not in (None, 1),
    "function_call": lambda v: v not in (None, "none"),
    "prompt_logprobs": lambda v: v not in (None, False),  # text completions have echo with logprobs
    "modalities": lambda v: v not in (None, ["text"]),
    "response_format": lambda v: v not in (None, {"type": "text"}),
    "tool_choice": lambda v: v not in (None, "none", "auto"),
    "web_search_options": lambda v: v is not None,
}
_WITHOUT_EFFECT = frozenset(
    "metadata moderation parallel_tool_calls prompt_cache_key prompt_cache_retention reasoning_effort "
    "safety_identifier service_tier store user verbosity".split()
)
_warned: set[str] = set()


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Schema):
    include_usage: bool | None = None


class GenerationRequest(_Schema):
    """What chat and text completions have in common. Null means the same as leaving a field out."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int64 | None = None
    max_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None  # JSON's keys are strings
    seed: Int64 | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None  # each costs time on every token
    # Beyond OpenAI's:
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int64 | None = None
    stop_token_ids: list[Int64] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Int64 | None = None

    def check_fields(self) -> None:
        """Refuses fields that would change the answer but aren't supported; notes unknown ones once in the log.

        Raises:
            RequestError: naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            asked = _UNSUPPORTED.get(name)
            if asked is not None:
                if asked(value):
                    raise RequestError(f"{name} is not supported by this server; leave it out", name)
            elif name not in _WITHOUT_EFFECT | _warned and len(_warned) < _MAX_WARNINGS:
                _warned.add(name)
                logger.warning("ignoring the unknown request field %r (said once)", name[:100])

    def sampling_params(self) -> SamplingParams:
        """
        Raises:
            RequestError: a value out of range, naming the field.
        """
        fields = _SAMPLING_FIELDS & type(self).model_fields.keys()
        given = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return SamplingParams(**{**given, **self._own_params()})

    def _own_params(self) -> dict[str, Any]:
        """The fields that chat and text completions spell differently."""
        return {}


class ContentPart(_Schema):
    type: str
    text: str | None = None


class Message(_Schema):
    """One turn of a chat. Extra fields (name, tool_call_id …) reach the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: there is no role 'developer', and the content is never null."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role, "content": self._content()}

    def _content(self) -> str | list[dict[str, Any]]:
        if isinstance(self.content, list):
            return [part.model_dump(exclude_none=True) for part in self.content]
        return self.content or ""


Messages = Annotated[list[Message], Field(min_length=1)]


class _Rendered(_Schema):
    """How messages become a prompt."""

    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    def template_options(self) -> dict[str, Any]:
        """
        Raises:
            RequestError: a variable of the template that has a field of its own.
        """
        options = self.chat_template_kwargs or {}
        if reserved := options.keys() & {"messages", "tools"}:
            raise RequestError(f"chat_template_kwargs may not set {', '.join(reserved)}", "chat_template_kwargs")
        return {"add_generation_prompt": self.add_generation_prompt is not False, **options}


class ChatCompletionRequest(GenerationRequest, _Rendered):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None

    def _own_params(self) -> dict[str, Any]:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        params: dict[str, Any] = {"logprobs": bool(self.logprobs), "top_logprobs": self.top_logprobs or 0}
        if self.max_completion_tokens is not None:
            params["max_tokens"] = self.max_completion_tokens
        return params


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions: a prompt or several, as text or as token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[int], Field(min_length=1, fail_fast=True)]
        | Annotated[list[list[int]], Field(min_length=1, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    def _own_params(self) -> dict[str, Any]:
        if self.logprobs is None:
            return {}
        return {"logprobs": True, "top_logprobs": self.logprobs, "prompt_logprobs": bool(self.echo)}

    def texts_or_ids(self) -> list[str] | list[list[int]]:
        """One entry a prompt."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class TokenizeRequest(_Rendered):
    """Body of POST /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # null: as generation does


class DetokenizeRequest(_Schema):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[Int64]
    skip_special_tokens: bool = False


class AbortRequest(_Schema):
    """Body of POST /abort: the `id` of an answer."""

    request_id: str
