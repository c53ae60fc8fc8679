"""`minisgl generate`: answers on the terminal, or from one file to another, by an engine in this process."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from minisgl.cli import options
from minisgl.cli.batch_input import Defaults
from minisgl.cli.report import Report
from minisgl.config import EngineConfig
from minisgl.types import ConfigError, SamplingParams

HELP = "Answer prompts on the terminal, or a file of them."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to answer; several are answered in order")
    parser.add_argument("--input", type=Path, metavar="FILE", help="a file of requests instead, one JSON object a line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where their answers go; continued if it exists")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, before the prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of an answer, at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's own)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each answer, and nothing else")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Streams answers to stdout, each followed by a line about tokens and times on stderr; or runs a batch job.

    Raises:
        MinisglError: wrong options, no such model, or a prompt that can't be served.
    """
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=args.ignore_eos)
    config = options.engine_config(args)
    _check(args)
    if args.input is not None:
        from minisgl.cli.batch import run_batch

        defaults = Defaults(args.max_tokens, args.temperature, args.ignore_eos, args.system)
        run_batch(args.input, args.output, config, defaults)
    else:
        _answer(args, config, params)


def _check(args: argparse.Namespace) -> None:
    if bool(args.prompts) == (args.input is not None):
        raise ConfigError("expected prompts as arguments, or a file of requests with --input")
    if (args.input is None) != (args.output is None):
        raise ConfigError("--input and --output go together")
    if args.input is not None and (args.raw or args.json):
        raise ConfigError(
            "--raw and --json are for prompts given as arguments; in a file, a line with a prompt is continued as it "
            "is, a line with messages goes through the chat template, and answers are JSON anyway"
        )


def _answer(args: argparse.Namespace, config: EngineConfig, params: SamplingParams) -> None:
    """Prints the answers in the order of the prompts, while the engine works on all of them.

    Of several, a later one may long be there when its turn to be printed comes: they are timed together.
    """
    from minisgl.llm import LLM

    llm = LLM(**{name: getattr(config, name) for name in options.ENGINE_OPTIONS})
    began, num_tokens, several = time.perf_counter(), 0, len(args.prompts) > 1
    streams = [llm.stream(_prompt(prompt, args), params) for prompt in args.prompts]
    for prompt, stream in zip(args.prompts, streams, strict=True):
        if several and not args.json:
            print(f"> {prompt}", file=sys.stderr)
        report = Report(timed=not several)
        for delta in stream:
            report.add(delta)
            if not args.json:
                print(delta.text, end="", flush=True)
        if args.json:
            print(json.dumps(report.as_dict()))
        else:
            print(flush=True)
            print(report.line(), file=sys.stderr)
        num_tokens += report.last.num_output
    if several and not args.json:
        seconds = time.perf_counter() - began
        total = f"{len(streams)} answers, {num_tokens} output tokens in {seconds:.2f} s"
        print(f"{total}, {num_tokens / seconds:.1f} tokens/s in all", file=sys.stderr)


def _prompt(prompt: str, args: argparse.Namespace) -> Any:
    if args.raw:
        return prompt
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": prompt}]
