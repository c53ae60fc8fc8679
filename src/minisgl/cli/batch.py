"""`minisgl generate --input … --output …`: many requests from a file, their answers to another, resumable."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.cli import options
from minisgl.cli.batch_input import BatchRequest, Defaults, read_lines
from minisgl.cli.batch_output import AnswerFile
from minisgl.types import Completion, ConfigError, FinishReason, RequestError, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from minisgl.config import EngineConfig
    from minisgl.llm import LLM
    from minisgl.text import Tokenizer

Work = tuple[BatchRequest, str | list[int], SamplingParams]
Report = Callable[[int, int, int], None]


def run_batch(source: Path, target: Path, config: EngineConfig, defaults: Defaults) -> None:
    """Answers every line of `source` that has no answer in `target` yet.

    Raises:
        ConfigError: a file can't be used, or they don't belong together.
        MinisglError: the model can't be loaded, or the answers can't be written.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"--input and --output are both {source}")
    next(read_lines(source), None)  # before the output is made, and the model loaded
    with closing(AnswerFile(target, _settings(config, defaults))) as answers:
        total, before = answers.check(read_lines(source)), len(answers.answered)
        if before == total:
            print(f"{target}: all {total} lines are answered already", file=sys.stderr)
            return
        from minisgl.llm import LLM

        llm = LLM(**{name: getattr(config, name) for name in options.ENGINE_OPTIONS})
        job = _Job(llm, config.model, source, answers, defaults)
        began = time.perf_counter()
        try:
            with _progress(total, before) as report:
                job.run(report)
        except KeyboardInterrupt:
            left = total - len(answers.answered)
            print(f"stopped; {left} of {total} lines are left, the same command goes on with them", file=sys.stderr)
            raise
        seconds = time.perf_counter() - began
        earlier = f", {before} of them by earlier runs" if before else ""
        print(
            f"{target}: {total} lines answered{earlier}, {answers.num_errors} with an error; "
            f"{job.num_tokens} tokens in {seconds:.1f} s, {job.num_tokens / seconds:.0f} tokens/s",
            file=sys.stderr,
        )


def _settings(config: EngineConfig, defaults: Defaults) -> str:
    """A digest of what changes answers."""
    shaping = [config.model, config.dtype, config.seed, config.dummy_weights, config.max_model_len, repr(defaults)]
    return hashlib.blake2b(json.dumps(shaping).encode(), digest_size=4).hexdigest()


class _Job:
    """Feeds lines to the engine and writes what comes back."""

    def __init__(self, llm: LLM, model: str, source: Path, answers: AnswerFile, defaults: Defaults) -> None:
        self._llm, self._model = llm, model
        self._source, self._answers, self._defaults = source, answers, defaults
        self.num_tokens = 0

    def run(self, report: Report) -> None:
        """Calls `report(lines answered, of these errors, tokens)` after each answer."""
        with closing(self._llm.run(self._requests())) as results:
            for request, result in results:
                if isinstance(result, RequestError):
                    self._write(request, failure(request, result))
                else:
                    self.num_tokens += sum(len(answer.token_ids) for answer in result.completions)
                    self._write(request, success(request, result, self._model, self._llm.tokenizer))
                report(len(self._answers.answered), self._answers.num_errors, self.num_tokens)
        report(len(self._answers.answered), self._answers.num_errors, self.num_tokens)  # if the last were refused

    def _write(self, request: BatchRequest, record: dict[str, Any]) -> None:
        self._answers.write(request.line, record)

    def _requests(self) -> Iterator[Work]:
        """The lines without an answer; what can't be served at all is answered here."""
        for line in read_lines(self._source):
            if line.number in self._answers.answered:
                continue
            request = BatchRequest(line)
            try:
                self._check_custom_id(request)
                prompt, params = request.prepare(self._llm.text, self._model, self._defaults)
            except RequestError as error:
                self._write(request, failure(request, error))
            else:
                yield request, prompt, params

    def _check_custom_id(self, request: BatchRequest) -> None:
        if request.custom_id is not None:
            first = self._answers.custom_ids.setdefault(request.custom_id, request.line.number)
            if first < request.line.number:
                raise RequestError(f"custom_id {request.custom_id!r} is that of line {first}", "custom_id")


@contextmanager
def _progress(total: int, before: int) -> Iterator[Report]:
    """A bar on standard error. Yields a function of lines answered, errors among them, and tokens in this run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=before, figures="")

        def report(done: int, errors: int, tokens: int) -> None:
            rate = tokens / (time.perf_counter() - began)
            failed = f", {errors} errors" if errors else ""
            bar.update(task, completed=done, figures=f"{rate:.0f} tokens/s{failed}")

        yield report


# -- records -------------------------------------------------------------------------------------------------------


def failure(request: BatchRequest, error: RequestError, status: int = 400) -> dict[str, Any]:
    """The record of a line that can't be answered."""
    detail = {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": None}
    if request.is_openai:
        return _openai(request, status, {"error": detail})
    return {**_named(request), "error": detail}


def success(request: BatchRequest, result: RequestOutput, model: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The record of an answer."""
    failed = next((a for a in result.completions if a.finish_reason is FinishReason.ERROR), None)
    if failed is not None:
        return failure(request, RequestError(failed.error or "the engine could not go on with this request"), 500)
    choices = [_choice(request, answer, tokenizer) for answer in result.completions]
    usage = _usage(result)
    if request.is_openai:
        body = {
            "id": f"line-{request.line.number}",
            "object": "chat.completion" if request.is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": usage,
        }
        return _openai(request, 200, body)
    first = result.completions[0]
    record = {**_named(request), "text": first.text, "finish_reason": first.finish_reason, "usage": usage}
    return record | ({"choices": choices} if len(choices) > 1 or first.logprobs is not None else {})


def _named(request: BatchRequest) -> dict[str, Any]:
    return {} if request.custom_id is None else {"custom_id": request.custom_id}


def _openai(request: BatchRequest, status: int, body: dict[str, Any]) -> dict[str, Any]:
    id = f"line-{request.line.number}"
    response = {"status_code": status, "request_id": id, "body": body}
    return {"id": id, "custom_id": request.custom_id, "response": response, "error": None}


def _choice(request: BatchRequest, answer: Completion, tokenizer: Tokenizer | None) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": answer.text}} if request.is_chat else {"text": answer.text}
    logprobs = None if answer.logprobs is None else {"content": [_logprob(t, tokenizer) for t in answer.logprobs]}
    return {"index": answer.index, **said, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def _logprob(token: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = b"" if tokenizer is None else tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "token_id": token_id, "logprob": max(logprob, -9999.0)}

    return {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*top) for top in token.top]}


def _usage(result: RequestOutput) -> dict[str, Any]:
    prompt, output = len(result.prompt_token_ids), sum(len(answer.token_ids) for answer in result.completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": result.num_cached},
    }
