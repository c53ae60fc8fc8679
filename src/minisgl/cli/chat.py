"""A conversation with a model in this process. Knows nothing of terminals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from minisgl.cli.report import Report
from minisgl.types import FinishReason, RequestError, SamplingParams

if TYPE_CHECKING:
    from minisgl.llm import LLM


class Chat:
    """What was said so far, and the way to go on.

    Args:
        model: the model's name, to be shown.
        system: system message; None leaves it to the model's chat template.
    """

    def __init__(self, llm: LLM, model: str, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self.model = f"{model}, {llm.engine.config.dtype} on {llm.engine.config.device}"
        self._params = params
        self.system = system
        self.messages: list[dict[str, str]] = []  # without the system message
        self.num_tokens = 0  # of the conversation, as the model last saw it
        self.num_answers = 0
        self.stop = False  # set from a signal's handler: the answer under way is to end
        self._output_tokens, self._decode_s = 0, 0.0  # over all answers, without each one's first token
        self._cached_tokens, self._prompt_tokens = 0, 0

    def reset(self, system: str | None) -> None:
        """Forgets what was said, and sets the system message."""
        self.messages, self.system, self.num_tokens = [], system, 0

    def ask(self, text: str, show: Callable[[str], None], stoppable: bool = True) -> Report:
        """Says `text` and streams the answer to `show`.

        Args:
            stoppable: whether Ctrl-C ends only the answer. What was answered by then stays in the conversation; if
                that is nothing, the question goes too.

        Raises:
            RequestError: it can't be answered, such as a conversation that outgrew the context; it is not kept.
            KeyboardInterrupt: Ctrl-C, unless `stoppable`.
        """
        question = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        report = Report()
        try:
            with closing(self._llm.stream([*system, *self.messages, question], self._params)) as stream:
                for delta in stream:
                    if self.stop:
                        raise KeyboardInterrupt
                    report.add(delta)
                    show(delta.text)
        except KeyboardInterrupt:
            if not stoppable:
                raise
            report.last.finish_reason = FinishReason.ABORT
        if report.last.finish_reason is FinishReason.ERROR:
            raise RequestError(report.last.error or "the engine could not go on with the answer")
        self._keep(question, report)
        return report

    def _keep(self, question: dict[str, str], report: Report) -> None:
        if report.text or report.last.finish_reason is not FinishReason.ABORT:
            self.messages += [question, {"role": "assistant", "content": report.text}]
            self.num_tokens = report.last.num_prompt + report.last.num_output
        self.num_answers += 1
        self._prompt_tokens += report.last.num_prompt
        self._cached_tokens += report.last.num_cached
        if report.first is not None:
            self._output_tokens += report.last.num_output - 1
            self._decode_s += report.end - report.first

    @property
    def context(self) -> int:
        """Tokens that a conversation may have, the answer included."""
        return self._llm.engine.max_total_tokens

    def ended_because(self, report: Report) -> str | None:
        """Why an answer broke off, and what to do; None if the model had said what it wanted to say."""
        if report.last.finish_reason is FinishReason.ABORT:
            return "stopped"
        if report.last.finish_reason is not FinishReason.LENGTH:
            return None
        if self.num_tokens >= self.context:
            return f"the context of {self.context} tokens is full; /reset starts a new conversation"
        return f"cut off at --max-tokens {self._params.max_tokens}"

    def refusal(self, error: RequestError) -> str:
        """What went wrong with a message, and what to do."""
        if error.param == "prompt":  # a rendered conversation can only be too long
            return (
                f"the conversation is too long: {error}. The message was not kept. "
                "/reset starts a new conversation; a larger --max-model-len helps if the model and memory allow it"
            )
        return f"{error}. The message was not kept; /reset starts a new conversation"

    def stats(self) -> list[str]:
        """Lines about the model, the conversation and the cache."""
        stats = self._llm.engine.stats()
        lines = [
            f"model         {self.model}",
            f"conversation  {len(self.messages)} messages, {self.num_tokens} of {self.context} tokens",
            f"answers       {self.num_answers}",
            f"KV cache      {stats.num_pages - stats.num_free_pages} of {stats.num_pages} pages in use",
        ]
        if self._decode_s:
            lines[2] += f", {self._output_tokens / self._decode_s:.1f} tokens/s after the first token"
        if self._prompt_tokens:
            lines[3] += f"; {self._cached_tokens} of {self._prompt_tokens} prompt tokens came from it"
        return lines
