"""Rendering a conversation with the model's own chat template, in a sandbox.

Templates come with models, that is from strangers: they run in jinja2's immutable sandbox and see plain data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisgl.types import RequestError

DEFAULT, TOOL_USE = "default", "tool_use"


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda format: datetime.now().strftime(format)}
    return env


class ChatTemplate:
    """A model's chat templates by name; `tool_use` is taken when a request brings tools, else `default`.

    Args:
        templates: jinja2 source by name.
        special_tokens: bos_token, eos_token …, which templates may write.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._env = _environment()
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any,
    ) -> str:  # fmt: skip
        """The prompt for `messages`; encode it without adding special tokens.

        Args:
            messages: objects with 'role' and 'content'; a content that is a list of text parts is joined by newlines.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions, handed to the template.
            kwargs: further variables for the template, such as enable_thinking.

        Raises:
            RequestError: the template refuses the messages (its own words are in the error), or can't be used.
        """
        template = self._get(TOOL_USE if tools and TOOL_USE in self.templates else DEFAULT)
        data = {**kwargs, "tools": None if tools is None else list(tools), "documents": kwargs.get("documents")}
        variables = self._special_tokens | {name: plain_data(value, name) for name, value in data.items()}
        plain = [_message(message, i) for i, message in enumerate(messages)]
        try:
            return template.render(messages=plain, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as e:  # its own refusal, or an operation that doesn't fit the messages, whatever that raises
            raise RequestError(f"the model's chat template refuses this request: {e}", "messages") from e

    def _get(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            if name not in self.templates:
                have = ", ".join(sorted(self.templates))
                raise RequestError(
                    f"this model has no {name} chat template, only {have}; send a prompt to /v1/completions instead"
                )
            try:
                self._compiled[name] = self._env.from_string(self.templates[name])
            except jinja2.TemplateError as e:
                raise RequestError(f"the model's chat template doesn't compile: {e}", "messages") from e
        return self._compiled[name]


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"messages[{index}] is a {type(message).__name__}; expected an object with role and content", "messages"
        )
    plain: dict[str, Any] = plain_data(message, f"messages[{index}]")
    if isinstance(plain.get("content"), list):
        plain["content"] = _join_parts(plain["content"], index)
    return plain


def _join_parts(parts: list[Any], index: int) -> str:
    """Text of a content list: templates of text models expect a string."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"messages[{index}] has a content part of type {kind}; expected text parts, "
                "this server runs text models only",
                "messages",
            )
    return "\n".join(part["text"] for part in parts)


def plain_data(value: Any, where: str) -> Any:
    """`value` rebuilt from plain JSON types: what a template gets has no methods worth abusing.

    Raises:
        RequestError: something in it is no JSON value.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str):  # an enum's member, say
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    raise RequestError(f"{where} is a {type(value).__name__}; expected a JSON value", "messages")


def find_in_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: chat_template.jinja and additional_chat_templates/ go before tokenizer_config.json."""
    templates = {path.stem: path.read_text("utf-8") for path in (folder / "additional_chat_templates").glob("*.jinja")}
    main = folder / "chat_template.jinja"
    if main.is_file():
        templates[DEFAULT] = main.read_text("utf-8")
    return templates or _named(config.get("chat_template"))


def find_in_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name from tokenizer.chat_template and tokenizer.chat_template.NAME."""
    key = "tokenizer.chat_template"
    named = {k[len(key) + 1 :]: v for k, v in metadata.items() if k.startswith(key + ".")}
    return _named(metadata.get(key)) | named


def _named(entry: object) -> dict[str, str]:
    if isinstance(entry, str):
        return {DEFAULT: entry}
    if isinstance(entry, list):
        return {item["name"]: item["template"] for item in entry}
    return dict(entry) if isinstance(entry, dict) else {}
