"""`minisgl generate`: one answer on the terminal, from an engine in this process."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from minisgl.cli import options
from minisgl.types import SamplingParams, TextDelta

if TYPE_CHECKING:
    from minisgl.llm import LLM

HELP = "Answer a prompt on the terminal."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to answer")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, before the prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of the answer, at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's own)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, nothing before")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Streams the answer to stdout, then one line about tokens and times to stderr.

    Raises:
        MinisglError: wrong options, no such model, or a prompt that can't be served.
    """
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=args.ignore_eos)
    config = options.engine_config(args)
    from minisgl.llm import LLM

    llm = LLM(**{name: getattr(config, name) for name in options.ENGINE_OPTIONS})
    report = _Report()
    for delta in llm.stream(_prompt(llm, args), params):
        report.add(delta)
        if not args.json:
            print(delta.text, end="", flush=True)
    if args.json:
        print(json.dumps(report.as_dict()))
    else:
        print(flush=True)
        print(report.line(), file=sys.stderr)


def _prompt(llm: LLM, args: argparse.Namespace) -> Any:
    if args.raw:
        return args.prompt
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": args.prompt}]


class _Report:
    """What came, and when."""

    def __init__(self) -> None:
        self.text = ""
        self._start = time.perf_counter()
        self._first: float | None = None  # seconds from the start, as `_end`
        self._end = 0.0
        self._last = TextDelta("")

    def add(self, delta: TextDelta) -> None:
        self._end = time.perf_counter() - self._start
        if self._first is None and delta.num_output:
            self._first = self._end
        self.text += delta.text
        self._last = delta

    def as_dict(self) -> dict[str, Any]:
        """Times in seconds; `tokens_per_second` is the rate after the first token."""
        last = self._last
        rate = None
        if self._first is not None and last.num_output > 1:
            rate = (last.num_output - 1) / max(self._end - self._first, 1e-9)
        return {
            "text": self.text,
            "finish_reason": last.finish_reason,
            "prompt_tokens": last.num_prompt,
            "output_tokens": last.num_output,
            "time_to_first_token": self._first,
            "tokens_per_second": rate,
        }

    def line(self) -> str:
        figures = self.as_dict()
        line = f"{figures['prompt_tokens']} prompt tokens, {figures['output_tokens']} output tokens"
        if self._first is not None:
            line += f", first token after {self._first:.2f} s"
        if figures["tokens_per_second"] is not None:
            line += f", then {figures['tokens_per_second']:.1f} tokens/s"
        return line
