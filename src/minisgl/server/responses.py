"""What clients get: the OpenAI response objects. msgspec encodes them, since a stream sends one a token."""

from __future__ import annotations

import time
from typing import Any

import msgspec


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """Token counts of all prompts and answers of a request; a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists over tokens, null at an echoed prompt's first; `text_offset` is in characters of the text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """The answer, or in a stream what it gained."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


Choice = ChatChoice | ChatChunkChoice | CompletionChoice


class Answer(msgspec.Struct):
    """A whole answer or one chunk of a stream; `object` says which."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None | msgspec.UnsetType = msgspec.UNSET


class ModelCard(msgspec.Struct):
    id: str
    max_model_len: int | None
    object: str = "model"
    created: int = msgspec.field(default_factory=lambda: int(time.time()))
    owned_by: str = "minisgl"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


class Tokens(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(msgspec.Struct):
    prompt: str


class Aborted(msgspec.Struct):
    """Sequences that were ended; 0 if the answer had ended already, or never was."""

    aborted: int


class Health(msgspec.Struct, omit_defaults=True):
    """`status` is ok, starting, stopping or failed; the counts are those after the engine's last step."""

    status: str
    error: str | None = None
    open_requests: int = 0  # sequences that haven't ended
    engine: dict[str, int] = {}
