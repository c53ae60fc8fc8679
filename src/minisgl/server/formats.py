"""How the two APIs word what a sequence gained."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionLogprobs,
    TopLogprob,
)
from minisgl.text import Text
from minisgl.types import TextDelta, TokenLogprob

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON doesn't have


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, text: Text) -> None:
        self._text = text
        self._begun: set[int] = set()  # sequences that have sent their role

    def choice(self, index: int, whole: TextDelta) -> ChatChoice:
        message = ChatMessage("assistant", whole.text)
        return ChatChoice(index, message, self._logprobs(whole.logprobs), _reason(whole))

    def chunks(self, index: int, delta: TextDelta) -> list[ChatChunkChoice]:
        """The role first, then text, then the reason of the end with nothing else."""
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(ChatChunkChoice(index, ChatMessage("assistant", ""), None, None))
        if delta.text or delta.logprobs:
            message = ChatMessage(content=delta.text)
            chunks.append(ChatChunkChoice(index, message, self._logprobs(delta.logprobs), None))
        if delta.finish_reason is not None:
            chunks.append(ChatChunkChoice(index, ChatMessage(), None, _reason(delta)))
        return chunks

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not tokens:
            return None
        return ChatLogprobs([self._token(t) for t in tokens])

    def _token(self, token: TokenLogprob) -> ChatTokenLogprob:
        top = [TopLogprob(*self._entry(id, logprob)) for id, logprob in token.top]
        return ChatTokenLogprob(*self._entry(token.token_id, token.logprob), top)

    def _entry(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        data = _bytes(self._text, token_id)
        return data.decode("utf-8", "replace"), max(logprob, MIN_LOGPROB), list(data)


class CompletionFormat:
    """text_completion, whole or in chunks."""

    object = chunk_object = "text_completion"

    def __init__(self, text: Text) -> None:
        self._text = text
        self._offsets: dict[int, int] = {}  # characters of the tokens told so far, by sequence

    def choice(self, index: int, whole: TextDelta) -> CompletionChoice:
        return CompletionChoice(index, whole.text, self._logprobs(index, whole.logprobs), _reason(whole))

    def chunks(self, index: int, delta: TextDelta) -> list[CompletionChoice]:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return []
        return [self.choice(index, delta)]

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if not tokens:
            return None
        result = CompletionLogprobs([], [], [], [])
        offset = self._offsets.get(index, 0)
        for token in tokens:
            result.tokens.append(self._token(token.token_id))
            result.token_logprobs.append(max(token.logprob, MIN_LOGPROB))
            result.top_logprobs.append({self._token(id): max(logprob, MIN_LOGPROB) for id, logprob in token.top})
            result.text_offset.append(offset)
            offset += len(_bytes(self._text, token.token_id).decode("utf-8", "replace"))
        self._offsets[index] = offset
        return result

    def _token(self, token_id: int) -> str:
        """The token's text; its bytes, spelt out, if they are no text by themselves: keys must not collide."""
        data = _bytes(self._text, token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bytes(text: Text, token_id: int) -> bytes:
    return b"" if text.tokenizer is None else text.tokenizer.token_bytes(token_id)


def _reason(delta: TextDelta) -> str | None:
    return None if delta.finish_reason is None else delta.finish_reason.value
