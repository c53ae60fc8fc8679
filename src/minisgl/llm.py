"""`LLM`: the engine in this process, without sockets."""

from __future__ import annotations

import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Self, TypeVar

from minisgl.config import DEFAULT_MODEL, SAMPLING_DEFAULTS, EngineConfig
from minisgl.models.hub import resolve_model
from minisgl.text import OutputProcessor, Tokenizer, load_text
from minisgl.timing import collector_off
from minisgl.types import Completion, ConfigError, RequestError, RequestOutput, SamplingParams, TextDelta

with collector_off():  # torch
    from minisgl.engine.lead import make_engine

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Key = TypeVar("Key")
MIN_IN_FLIGHT = 256  # requests that `run` keeps in the engine at least, so that one is always ready to start


class LLM:
    """Generates text from a model, offline.

        llm = LLM("smollm2")
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text)

    With `tp_size=N` the model is split over N ranks, N - 1 of them processes of their own; they end with `close`, with
    the context (an LLM is a context manager) or with this process.

    Calls may be nested (a `stream` half read while `generate` runs) but not made from several threads. Ctrl-C takes
    effect between steps: what was under way is ended, and the next call finds everything in order.

    Args:
        model: see `minisgl --help`: an alias, a folder, a .gguf file or a hub id.
        sampling_defaults: for what SamplingParams leave open, "model": the model's own values, or "neutral".
        options: the other fields of `EngineConfig`.

    Raises:
        ModelError, ConfigError: the model can't be loaded or run as asked.
        EngineDeadError: a rank failed, here or in any later call; make a new LLM then.
    """

    def __init__(self, model: str = DEFAULT_MODEL, sampling_defaults: str = "model", **options: Any) -> None:
        if sampling_defaults not in SAMPLING_DEFAULTS:
            raise ConfigError(f"sampling_defaults is {sampling_defaults!r}; expected model or neutral")
        path = resolve_model(model)
        self.text = load_text(path)
        self.engine = make_engine(EngineConfig(model=str(path), **options))
        self._output = OutputProcessor(self.text.tokenizer)
        self._defaults = self.text.generation.sampling if sampling_defaults == "model" else {}
        self._inbox: dict[str, Callable[[TextDelta], object]] = {}  # who takes what a request under way gains
        self._ids = count()

    def close(self) -> None:
        """Ends the other ranks, if there are any; with them ends the use of this LLM. Idempotent."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        jobs: list[_Job] = []
        try:
            for prompt, params in zip(many, _one_each(sampling_params, len(many)), strict=True):
                jobs.append(self._start(prompt, params, []))
            for job in jobs:
                while job.num_open:
                    self._step()
            return [job.result for job in jobs]
        finally:
            for job in jobs:
                self._abandon(job.ids)

    def run(
        self, requests: Iterable[tuple[Key, Prompt | Messages, SamplingParams | None]], max_in_flight: int | None = None
    ) -> Generator[tuple[Key, RequestOutput | RequestError]]:
        """Serves any number of requests, and yields each one's result as soon as it is there.

        Args:
            requests: key (handed back with the result), prompt or conversation, parameters. Taken from the iterable
                as room comes free: it may be endless, or be made while this runs.
            max_in_flight: requests under way; by default twice what the engine computes at a time, at least 256.

        Yields:
            (key, result), in the order of completion. What can't be served yields its RequestError as the result.
        """
        limit = max_in_flight or max(MIN_IN_FLIGHT, 2 * (self.engine.config.max_running or 0))
        source = iter(requests)
        running: dict[_Job, Key] = {}
        ended: list[_Job] = []
        try:
            while True:
                while len(running) < limit and (request := next(source, None)) is not None:
                    key, prompt, params = request
                    try:
                        running[self._start(prompt, params or SamplingParams(), ended)] = key
                    except RequestError as error:
                        yield key, error
                if not running:
                    return
                self._step()
                while ended:
                    job = ended.pop(0)
                    yield running.pop(job), job.result
        finally:
            for job in running:
                self._abandon(job.ids)

    def chat(
        self, messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, **template_options: Any,
    ) -> list[RequestOutput]:  # fmt: skip
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
    ) -> Generator[TextDelta]:
        """Generates piece by piece; `prompt` is a text, token ids or a conversation. Closing it ends the request.

        Raises:
            RequestError: at the call, not at the first piece; `n` must be 1.
        """
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream has one answer", "n")
        deltas: deque[TextDelta] = deque()
        stream = self._stream(self._add(self._tokens(prompt, template_options), params, deltas.append), deltas)
        next(stream)  # from here on closing it ends the request, whether it was read or not
        return stream

    # -- inside --------------------------------------------------------------------------------------------------

    def _stream(self, request_id: str, deltas: deque[TextDelta]) -> Generator[TextDelta]:
        """What a request gains, after a first empty piece; runs the engine, for everybody, when there is nothing."""
        try:
            yield (delta := TextDelta(request_id))
            while delta.finish_reason is None:
                while not deltas:
                    self._step()
                yield (delta := deltas.popleft())
        finally:
            self._abandon([request_id])

    def _render(self, messages: Messages, options: dict[str, Any]) -> list[int]:
        prompt = self.text.require_chat_template().render(list(messages), **options)
        return self._encode(prompt, add_special_tokens=False)

    def _encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return self.text.require_tokenizer().encode(prompt, add_special_tokens=add_special_tokens)

    def _tokens(self, prompt: Prompt | Messages, template_options: dict[str, Any]) -> list[int]:
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            return self._render(prompt, template_options)  # type: ignore[arg-type]
        return self._encode(prompt)  # type: ignore[arg-type]

    def _start(self, prompt: Prompt | Messages, params: SamplingParams, ended: list[_Job]) -> _Job:
        tokens = self._tokens(prompt, {})
        answers = [Completion(k, logprobs=[] if params.logprobs else None) for k in range(params.n)]
        job = _Job(RequestOutput(prompt if isinstance(prompt, str) else None, tokens, answers), ended, params.n)
        try:
            for answer in answers:
                job.ids.append(self._add(tokens, params.nth(answer.index), partial(job.take, answer)))
        except BaseException:
            self._abandon(job.ids)
            raise
        return job

    def _add(self, tokens: Sequence[int], params: SamplingParams, take: Callable[[TextDelta], object]) -> str:
        request_id = str(next(self._ids))
        params = params.resolve(self._defaults, self.text.generation.eos_token_ids)
        try:
            prompt = array("i", tokens)
        except (OverflowError, TypeError) as e:
            raise RequestError(f"a prompt of token ids has something that is no token id: {e}", "prompt") from None
        try:
            with _ctrl_c_waits():
                self._inbox[request_id] = take
                self._output.add(request_id, prompt, params)
                self.engine.add(request_id, prompt, params)
        except BaseException:
            self._abandon([request_id])
            raise
        return request_id

    def _step(self) -> None:
        with _ctrl_c_waits():
            deltas, finished = self._output.process(self.engine.step())
            for request_id in finished:
                self.engine.finish(request_id)
            for delta in deltas:
                take = self._inbox.get if delta.finish_reason is None else self._inbox.pop
                take(delta.request_id, _nobody)(delta)

    def _abandon(self, request_ids: Sequence[str]) -> None:
        """Forgets requests; those still running are ended."""
        with _ctrl_c_waits():
            for request_id in request_ids:
                if self._inbox.pop(request_id, None) is not None:
                    self._output.abort(request_id)
                    self.engine.abort(request_id)


@dataclass(slots=True, eq=False)
class _Job:
    """A prompt under way: its result so far. With the end of its last answer it joins the list `ended`."""

    result: RequestOutput
    ended: list[_Job]
    num_open: int
    ids: list[str] = field(default_factory=list)  # of its requests, one an answer

    def take(self, answer: Completion, delta: TextDelta) -> None:
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        if answer.logprobs is not None:
            answer.logprobs += delta.logprobs
        answer.finish_reason, answer.stop_reason, answer.error = delta.finish_reason, delta.stop_reason, delta.error
        self.result.num_cached = max(self.result.num_cached, delta.num_cached)
        if delta.finish_reason is not None:
            self.num_open -= 1
            if not self.num_open:
                self.ended.append(self)


def _nobody(delta: TextDelta) -> None:
    """Takes what an abandoned request still gained."""


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Holds SIGINT back: an exception in the middle of a step would leave the engine half way."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []  # without the frame: that would keep its variables alive, views of arrays that are to grow
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(held[0], None)


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
