"""What clients get: the OpenAI response objects. msgspec encodes them, since a stream sends one a token."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from minisgl.types import FinishReason


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """Token counts of all prompts and answers of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatTokenLogprob(msgspec.Struct):
    """A token of the answer, or one of those that might have stood there; these have no `top_logprobs`."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTokenLogprob] | msgspec.UnsetType = msgspec.UNSET


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
    """`message` in a whole answer, `delta` in a chunk."""

    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    message: ChatMessage | msgspec.UnsetType = msgspec.UNSET
    delta: ChatMessage | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Answer(msgspec.Struct):
    """A whole answer or one chunk of a stream; `object` says which."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]  # ChatChoice or CompletionChoice
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


class Profile(msgspec.Struct, omit_defaults=True):
    """`capturing` from here on, or not any more: then `path` is the trace that was written, on the server's machine."""

    capturing: bool
    path: str | None = None


class Health(msgspec.Struct, omit_defaults=True):
    """`status` is ok, starting, stopping or failed; the counts are those after the engine's last step."""

    status: str
    error: str | None = None
    open_requests: int = 0  # sequences that haven't ended
    engine: dict[str, int] = {}
