"""Text on both sides of the engine: tokens, chat templates, streams, stop strings. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minisgl.gguf_file import read_gguf, read_json
from minisgl.text import chat_template, generation
from minisgl.text.chat_template import ChatTemplate
from minisgl.text.generation import GenerationDefaults
from minisgl.text.output import OutputProcessor
from minisgl.text.tokenizer import Tokenizer
from minisgl.types import ModelError, RequestError

__all__ = ["ChatTemplate", "GenerationDefaults", "OutputProcessor", "Text", "Tokenizer", "load_text"]


@dataclass(frozen=True, slots=True)
class Text:
    """A model's side of text. Without a tokenizer it takes and gives token ids only."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation: GenerationDefaults

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: the model has none.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; send token ids instead of text")
        return self.tokenizer

    def require_chat_template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            RequestError: the model has none.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template, so it takes no messages: send a prompt to /v1/completions (or "
                "LLM.generate), or put a chat_template.jinja into the model's folder",
                "messages",
            )
        return self.chat_template


def load_text(path: Path) -> Text:
    """Tokenizer, chat template and defaults of the model at `path`, a folder or a .gguf file.

    Raises:
        ModelError: `path` is neither, or its tokenizer files can't be used.
    """
    if path.is_dir():
        tokenizer = Tokenizer.from_folder(path)
        templates = chat_template.find_in_folder(path, read_json(path / "tokenizer_config.json"))
        defaults = generation.from_folder(path, tokenizer)
    elif path.is_file():
        metadata = read_gguf(path).metadata
        tokenizer = Tokenizer.from_gguf(metadata)
        templates = chat_template.find_in_gguf(metadata)
        defaults = generation.from_gguf(metadata)
    else:
        raise ModelError(f"there is no model at {path}; expected a folder or a .gguf file")
    if tokenizer is None or not templates:
        return Text(tokenizer, None, defaults)
    return Text(tokenizer, ChatTemplate(templates, tokenizer.special_tokens), defaults)
