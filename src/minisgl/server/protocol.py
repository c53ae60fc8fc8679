"""What clients send: the OpenAI request schemas and the sampling extras that other engines have too."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from minisgl.types import RequestError, SamplingParams

logger = logging.getLogger(__name__)

_SAMPLING_FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]

# Fields that aren't supported, each with the test of whether its value asks for something.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("audio", "echo", "functions", "guided_json", "prediction", "suffix", "tools"), bool),
    "best_of": lambda v: v not in (None, 1),
    "function_call": lambda v: v not in (None, "none"),
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
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    # Beyond OpenAI's:
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None

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
            elif name not in _WITHOUT_EFFECT and name not in _warned:
                _warned.add(name)
                logger.warning("ignoring the unknown request field %r (said once)", name[:100])

    def sampling_params(self) -> SamplingParams:
        """
        Raises:
            RequestError: a value out of range, naming the field.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name, None)) is not None}
        return SamplingParams(**{**given, **self._own_params(), "logit_bias": self._logit_bias()})

    def _own_params(self) -> dict[str, Any]:
        """The fields that chat and text completions spell differently."""
        return {}

    def _logit_bias(self) -> dict[int, float]:
        try:
            return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise RequestError("logit_bias maps token ids, written as strings, to numbers", "logit_bias") from None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


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


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

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
    logprobs: int | None = None

    def _own_params(self) -> dict[str, Any]:
        return {} if self.logprobs is None else {"logprobs": True, "top_logprobs": self.logprobs}

    def texts_or_ids(self) -> list[str] | list[list[int]]:
        """One entry a prompt."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
