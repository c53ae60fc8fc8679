"""How the two APIs word what a sequence gained."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.server.jobs import Job
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

    def __init__(self, job: Job) -> None:
        self._text = job.backend.text
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
    """text_completion, whole or in chunks. What `echo` asks for comes with the first of them."""

    object = chunk_object = "text_completion"

    def __init__(self, job: Job) -> None:
        self._text = job.backend.text
        self._job = job
        self._offsets: dict[int, int] = {}  # characters of the tokens told so far, by sequence

    def choice(self, index: int, whole: TextDelta) -> CompletionChoice:
        text, logprobs = whole.text, CompletionLogprobs()
        prompt = index // self._job.params.n
        if self._job.echo and index not in self._offsets:
            text = self._job.echo[prompt] + text
            if self._job.params.prompt_logprobs:
                self._add(logprobs, index, self._job.prompts[prompt][0])  # has nothing before it to depend on
        for token in (*whole.prompt_logprobs, *whole.logprobs):
            self._add(logprobs, index, token.token_id, token)
        self._offsets.setdefault(index, 0)
        return CompletionChoice(index, text, logprobs if logprobs.tokens else None, _reason(whole))

    def chunks(self, index: int, delta: TextDelta) -> list[CompletionChoice]:
        if delta.text or delta.logprobs or delta.prompt_logprobs or delta.finish_reason:
            return [self.choice(index, delta)]
        return []

    def _add(self, logprobs: CompletionLogprobs, index: int, token_id: int, token: TokenLogprob | None = None) -> None:
        name, offset = self._name(token_id), self._offsets.get(index, 0)
        value, top = None, None
        if token is not None:
            value = max(token.logprob, MIN_LOGPROB)
            top = {self._name(id): max(logprob, MIN_LOGPROB) for id, logprob in token.top} | {name: value}
        logprobs.tokens.append(name)
        logprobs.token_logprobs.append(value)
        logprobs.top_logprobs.append(top)
        logprobs.text_offset.append(offset)
        self._offsets[index] = offset + len(_bytes(self._text, token_id).decode("utf-8", "replace"))

    def _name(self, token_id: int) -> str:
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
