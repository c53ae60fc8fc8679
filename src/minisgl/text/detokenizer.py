"""Incremental detokenization: ids in, whole characters out.

A token is no unit of text: a character may span tokens, and a token's spaces may depend on the one before it. What
these classes emit, put together, equals the decoding of prompt and output at once, less the prompt's text; and what
was emitted never changes afterwards. The cost per token does not grow with the text.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from minisgl.text.tokenizer import Tokenizer, is_byte_token

_CONTEXT = 4  # prompt tokens to start from; a UTF-8 character has at most so many bytes
_MAX_HELD = 8  # tokens to hold back while a text seems to end inside a character


class Detokenizer(ABC):
    """Turns one sequence's ids into text as they come."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The end of a prompt: it may end inside a character, and begins where one may begin."""
        context: list[int] = []
        for i in reversed(prompt_ids):
            if self._is_kept(i):
                context.append(i)
                if len(context) >= _CONTEXT and not self._is_byte(i):
                    break
        return context[::-1]

    def _is_kept(self, token_id: int) -> bool:
        return token_id not in self._skipped and bool(self._tokenizer.token_bytes(token_id))

    def _is_byte(self, token_id: int) -> bool:
        """Whether this is a single byte of a character, in a vocabulary that has other tokens too."""
        if not self._tokenizer.byte_fallback:
            return False
        return is_byte_token(self._tokenizer.backend.id_to_token(token_id) or "")

    @abstractmethod
    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; may be empty."""

    @abstractmethod
    def flush(self) -> str:
        """The text held back so far; call it at the end."""


def make_detokenizer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
) -> Detokenizer:
    """A detokenizer for the text that follows `prompt_ids`."""
    kind = ByteLevelDetokenizer if tokenizer.byte_level else WindowDetokenizer
    return kind(tokenizer, prompt_ids, skip_special_tokens)


class ByteLevelDetokenizer(Detokenizer):
    """For vocabularies of bytes: an incremental UTF-8 decoder over the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.push(self._context(prompt_ids))

    def push(self, ids: Iterable[int]) -> str:
        token_bytes, skipped = self._tokenizer.token_bytes, self._skipped
        data = b"".join([token_bytes(i) for i in ids if i not in skipped])
        if not self._decoder.getstate()[0]:  # no character is half read: what is in C may do
            try:
                return data.decode()
            except UnicodeDecodeError:
                pass
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer(Detokenizer):
    """For every other vocabulary: decode a short window, and again with the new tokens; the difference is new text.

    The window begins at a token that gave text, so that a decoder which drops a leading space drops it in both. A run
    of byte tokens is held back until it ends: the decoder reads it as a whole, and as U+FFFD only if any part is bad.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._window = self._context(prompt_ids)
        self._start_at_end()

    def push(self, ids: Iterable[int]) -> str:
        self._window += [i for i in ids if self._is_kept(i)]
        if len(self._window) == self._num_emitted or self._is_byte(self._window[-1]):
            return ""
        text = self._decode()
        if text.endswith("\ufffd") and len(self._window) - self._num_emitted < _MAX_HELD:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._decode())

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted) :]
        if new:
            del self._window[: self._num_emitted]
            self._start_at_end()
        return new

    def _start_at_end(self) -> None:
        """All tokens of the window have been emitted."""
        self._num_emitted = len(self._window)
        self._emitted = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)
