"""How the two APIs word what a sequence gained."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.server.jobs import Job
from minisgl.server.responses import (
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionLogprobs,
)
from minisgl.types import TextDelta, TokenLogprob

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON doesn't have


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begun: set[int] = set()  # sequences that have sent their role

    def choice(self, index: int, whole: TextDelta) -> ChatChoice:
        """A choice of a whole answer."""
        message = ChatMessage("assistant", whole.text)
        return ChatChoice(index, self._logprobs(whole.logprobs), whole.finish_reason, message=message)

    def chunks(self, index: int, delta: TextDelta) -> list[ChatChoice]:
        """The choices to send, one a chunk: the role first, then text, then the reason of the end by itself."""
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(ChatChoice(index, delta=ChatMessage("assistant", "")))
        if delta.text or delta.logprobs:
            chunks.append(ChatChoice(index, self._logprobs(delta.logprobs), delta=ChatMessage(content=delta.text)))
        if delta.finish_reason is not None:
            chunks.append(ChatChoice(index, None, delta.finish_reason, delta=ChatMessage()))
        return chunks

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not tokens:
            return None
        entries = [self._entry(t.token_id, t.logprob) for t in tokens]
        for entry, token in zip(entries, tokens, strict=True):
            entry.top_logprobs = [self._entry(id, logprob) for id, logprob in token.top]
        return ChatLogprobs(entries)

    def _entry(self, token_id: int, logprob: float) -> ChatTokenLogprob:
        data = self._job.token_bytes(token_id)
        return ChatTokenLogprob(data.decode("utf-8", "replace"), max(logprob, MIN_LOGPROB), list(data))


class CompletionFormat:
    """text_completion, whole or in chunks. What `echo` asks for comes with the first of them."""

    object = chunk_object = "text_completion"

    def __init__(self, job: Job) -> None:
        self._job = job
        self._offsets: dict[int, int] = {}  # characters of the tokens told so far, by sequence

    def choice(self, index: int, whole: TextDelta) -> CompletionChoice:
        """A choice of an answer, or of a chunk."""
        job, text, logprobs = self._job, whole.text, CompletionLogprobs()
        if job.echo is not None and index not in self._offsets:
            prompt = index // job.params.n
            text = job.echo[prompt] + text
            if job.params.prompt_logprobs:
                self._add(logprobs, index, job.prompts[prompt][0])  # has nothing before it to depend on
        for token in (*whole.prompt_logprobs, *whole.logprobs):
            self._add(logprobs, index, token.token_id, token)
        self._offsets.setdefault(index, 0)
        return CompletionChoice(index, text, logprobs if logprobs.tokens else None, whole.finish_reason)

    def chunks(self, index: int, delta: TextDelta) -> list[CompletionChoice]:
        """The choices to send, one a chunk."""
        some = delta.text or delta.logprobs or delta.prompt_logprobs or delta.finish_reason
        return [self.choice(index, delta)] if some else []

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
        self._offsets[index] = offset + self._job.num_characters(token_id)

    def _name(self, token_id: int) -> str:
        """The token's text; its bytes, spelt out, if they are no text by themselves: keys must not collide."""
        data = self._job.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
