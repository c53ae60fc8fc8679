"""The lines of a batch job's input: a request each, in the words of the HTTP API."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.types import ConfigError, RequestError, SamplingParams

if TYPE_CHECKING:
    from minisgl.text import Text

URLS = {"/v1/chat/completions": True, "/v1/completions": False}  # whether the body holds messages


@dataclass(frozen=True, slots=True)
class Line:
    """A line as it stands in the file. `number` counts from 1, empty lines included."""

    number: int
    data: bytes

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.data, digest_size=8).hexdigest()


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that isn't empty.

    Raises:
        ConfigError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data := data.strip():
                    yield Line(number, data)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from None


class BatchRequest:
    """What one line asks for.

    Lines are `{"prompt": text or token ids, …}`, `{"messages": […], …}` (both may have a `custom_id`), or OpenAI's
    batch format `{"custom_id": …, "url": …, "body": {…}}`, whose answers come in OpenAI's batch format too. What is
    wrong with a line is kept until `prepare`, so that the record of the error can name it.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self._fields: dict[str, Any] = {}
        self.custom_id: str | None = None
        self.is_openai = False
        self.is_chat = False
        self._error: RequestError | None = None
        try:
            self._read(line.data)
        except RequestError as error:
            self._error = error

    def _read(self, data: bytes) -> None:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the line is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise RequestError(f"the line is {type(fields).__name__}; expected a JSON object")
        custom_id = fields.pop("custom_id", None)
        self.is_openai = "body" in fields
        if custom_id is not None and not isinstance(custom_id, str):
            raise RequestError(f"custom_id is {custom_id!r}; expected a text", "custom_id")
        self.custom_id = custom_id
        url = fields.get("url")
        if self.is_openai:
            fields = fields["body"]
            if not isinstance(fields, dict):
                raise RequestError("body: expected a JSON object", "body")
            if url is not None and url not in URLS:
                raise RequestError(f"url is {url!r}; expected {' or '.join(URLS)}", "url")
        if ("messages" in fields) == ("prompt" in fields):
            raise RequestError("expected either prompt or messages", "prompt")
        self.is_chat = "messages" in fields
        if self.is_openai and url is not None and URLS[url] != self.is_chat:
            raise RequestError(f"{url} takes {'messages' if URLS[url] else 'a prompt'}", "url")
        self._fields = fields

    def prepare(self, text: Text, model: str, defaults: Defaults) -> tuple[str | list[int], SamplingParams]:
        """Prompt and parameters for `LLM.run`.

        Args:
            model: the model that answers; a line may name no other.
            defaults: for what the line leaves open.

        Raises:
            RequestError: it can't be served as written.
        """
        from minisgl.server.protocol import ChatCompletionRequest, CompletionRequest

        if self._error is not None:
            raise self._error
        body = _validate(ChatCompletionRequest if self.is_chat else CompletionRequest, defaults.fill(self._fields))
        if body.model not in (None, model):
            raise RequestError(f"the model {body.model!r} was asked for, but this job runs {model!r}", "model")
        body.check_fields()
        params: SamplingParams = body.sampling_params()
        if not self.is_chat:
            return _only_prompt(body), params
        messages = [message.for_template() for message in body.messages]
        prompt = text.require_chat_template().render(messages, **body.template_options())
        return text.require_tokenizer().encode(prompt, add_special_tokens=False), params


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the command line says for all lines that don't say it themselves."""

    max_tokens: int | None = None
    temperature: float | None = None
    ignore_eos: bool = False
    system: str | None = None

    def fill(self, fields: dict[str, Any]) -> dict[str, Any]:
        """`fields`, and what they lack."""
        filled = {k: v for k, v in fields.items() if v is not None}
        if "max_completion_tokens" not in filled and self.max_tokens is not None:
            filled.setdefault("max_tokens", self.max_tokens)
        if self.temperature is not None:
            filled.setdefault("temperature", self.temperature)
        if self.ignore_eos:
            filled.setdefault("ignore_eos", True)
        messages = filled.get("messages")
        if self.system is not None and isinstance(messages, list) and not _begins_with_system(messages):
            filled["messages"] = [{"role": "system", "content": self.system}, *messages]
        return filled


def _begins_with_system(messages: list[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") in ("system", "developer")


def _validate(schema: Any, fields: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        first, *_ = problems = error.errors(include_url=False, include_input=False)
        field = str(first["loc"][0]) if first["loc"] else ""
        expected = dict.fromkeys(str(p["msg"]) for p in problems if p["loc"][:1] == first["loc"][:1])
        raise RequestError(f"{field}: {'; or '.join(expected)}", field) from None


def _only_prompt(body: Any) -> str | list[int]:
    if getattr(body, "echo", None):
        raise RequestError("echo is not supported in a batch job; leave it out", "echo")
    prompts: list[Any] = body.texts_or_ids()
    if len(prompts) != 1:
        raise RequestError(f"prompt is a list of {len(prompts)}; a line holds one prompt", "prompt")
    prompt: str | list[int] = prompts[0]
    return prompt
