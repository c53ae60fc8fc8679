"""`LLM`: the engine in this process, without sockets."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from minisgl.config import DEFAULT_MODEL, EngineConfig
from minisgl.engine.engine import Engine
from minisgl.models.hub import resolve_model
from minisgl.text import OutputProcessor, Tokenizer, load_text
from minisgl.types import Completion, RequestError, RequestOutput, SamplingParams, TextDelta

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """Generates text from a model, offline.

        llm = LLM("smollm2")
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text)

    Calls may be nested (a `stream` half read while `generate` runs) but not made from several threads.

    Args:
        model: see `minisgl --help`: an alias, a folder, a .gguf file or a hub id.
        options: the other fields of `EngineConfig`.

    Raises:
        ModelError, ConfigError: the model can't be loaded or run as asked.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        path = resolve_model(model)
        self.text = load_text(path)
        self.engine = Engine(EngineConfig(model=str(path), **options))
        self._output = OutputProcessor(self.text.tokenizer)
        self._inbox: dict[str, deque[TextDelta]] = {}  # what requests under way gained and nobody read yet
        self._ids = count()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if its folder has none, and then prompts must be token ids."""
        return self.text.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; texts are encoded as they are, without a chat template.

        Args:
            prompts: one or several, each a text or token ids.
            sampling_params: for all, or one for each prompt; None takes the model's defaults.

        Returns:
            One result a prompt, in their order.

        Raises:
            RequestError: a prompt or parameter can't be served; nothing was generated.
        """
        many = _as_prompts(prompts)
        params = _one_each(sampling_params, len(many))
        ids: list[list[str]] = []
        try:
            prompt_ids = [self._encode(p) for p in many]
            for tokens, one in zip(prompt_ids, params, strict=True):
                ids.append([])
                for k in range(one.n):
                    ids[-1].append(self._add(tokens, _nth(one, k)))
            results = []
            for prompt, tokens, group, one in zip(many, prompt_ids, ids, params, strict=True):
                completions = [self._complete(id, k, one.logprobs) for k, id in enumerate(group)]
                text = prompt if isinstance(prompt, str) else None
                cached = max(cached for _, cached in completions)
                results.append(RequestOutput(text, list(tokens), [c for c, _ in completions], cached))
            return results
        finally:
            for group in ids:
                self._abandon(group)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered by the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "…"}, …]`, or a list of such lists.
            template_options: handed to the template, such as `enable_thinking`.

        Raises:
            RequestError: as `generate`, or the model has no chat template, or the template refuses the messages.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self._render(m, template_options) for m in many]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params)

    def stream(
        self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None, **template_options: Any
    ) -> Iterator[TextDelta]:
        """Generates piece by piece; `prompt` is a text, token ids or a conversation. Closing it ends the request.

        Raises:
            RequestError: at the call, not at the first piece; `n` must be 1.
        """
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream has one answer", "n")
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt = self._render(prompt, template_options)  # type: ignore[arg-type]
        request_id = self._add(self._encode(prompt), params)  # type: ignore[arg-type]
        return self._stream(request_id)

    # -- inside --------------------------------------------------------------------------------------------------

    def _stream(self, request_id: str) -> Iterator[TextDelta]:
        try:
            yield from self._deltas(request_id)
        finally:
            self._abandon([request_id])

    def _render(self, messages: Messages, options: dict[str, Any]) -> list[int]:
        prompt = self.text.require_chat_template().render(list(messages), **options)
        return self._encode(prompt, add_special_tokens=False)

    def _encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return self.text.require_tokenizer().encode(prompt, add_special_tokens=add_special_tokens)

    def _add(self, tokens: Sequence[int], params: SamplingParams) -> str:
        request_id = str(next(self._ids))
        params = params.resolve(self.text.generation.sampling, self.text.generation.eos_token_ids)
        try:
            prompt = array("i", tokens)
        except (OverflowError, TypeError) as e:
            raise RequestError(f"a prompt of token ids has something that is no token id: {e}", "prompt") from None
        self._output.add(request_id, prompt, params)
        try:
            self.engine.add(request_id, prompt, params)
        except RequestError:
            self._output.abort(request_id)
            raise
        self._inbox[request_id] = deque()
        return request_id

    def _deltas(self, request_id: str) -> Iterator[TextDelta]:
        """What a request gains, until its terminal delta; runs the engine, for everybody, when there is nothing."""
        inbox = self._inbox[request_id]
        while True:
            while not inbox:
                self._step()
            delta = inbox.popleft()
            yield delta
            if delta.finish_reason is not None:
                return

    def _step(self) -> None:
        deltas, finished = self._output.process(self.engine.step())
        for request_id in finished:
            self.engine.finish(request_id)
        for delta in deltas:
            if delta.request_id in self._inbox:
                self._inbox[delta.request_id].append(delta)

    def _complete(self, request_id: str, index: int, logprobs: bool) -> tuple[Completion, int]:
        result = Completion(index, logprobs=[] if logprobs else None)
        pieces, cached = [], 0
        for delta in self._deltas(request_id):
            pieces.append(delta.text)
            result.token_ids += delta.token_ids
            if result.logprobs is not None:
                result.logprobs += delta.logprobs
            result.finish_reason, result.stop_reason = delta.finish_reason, delta.stop_reason
            result.error = delta.error
            cached = max(cached, delta.num_cached)
        result.text = "".join(pieces)
        return result, cached

    def _abandon(self, request_ids: Sequence[str]) -> None:
        """Forgets requests; those still running are ended."""
        for request_id in request_ids:
            if self._inbox.pop(request_id, None) is not None:
                self._output.abort(request_id)
                self.engine.abort(request_id)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num
    if len(params) != num:
        raise RequestError(f"there are {num} prompts and {len(params)} sampling_params; give one, or one for each")
    return list(params)


def _nth(params: SamplingParams, k: int) -> SamplingParams:
    """Parameters of the k-th of n answers: with a seed, each has its own."""
    return replace(params, n=1, seed=None if params.seed is None else params.seed + k)
