"""`minisgl profile request`: where the time of one request to a real server goes."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.cli import options
from minisgl.cli.lab import page
from minisgl.types import ConfigError, MinisglError

if TYPE_CHECKING:
    from minisgl.cli.lab.server import Server
    from minisgl.profiling.spans import Span
    from minisgl.profiling.timeline import Answered

HELP = "serve a model, send it one request, and show where its time goes"
TRIES = 5
PROMPT = (
    "A step hands out a budget of tokens: first one to every request that is being answered, then pieces of prompts "
    "for what is left of it. So prompts and answers mix in one step, and a long prompt holds up nobody for long. "
    "Memory is given out in pages, as they are needed; when none is left, the request that came last gives up its own "
    "and waits. What was computed for it stays in the tree of prefixes, where it is found again. Explain why that is "
    "better than to set aside the memory for the longest answer that might come."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="what to continue (default: some 100 tokens)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of the answer (default: 32; quick: 8)")
    parser.add_argument("--warm-up", type=int, metavar="N", help="requests before it (default: 3; quick: 1)")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the two windows, to the first token and from there on; writes request.json and request.trace.json.

    Raises:
        MinisglError: the model can't be served, or the files not be written.
    """
    max_tokens = args.max_tokens or (8 if args.quick else 32)
    warm_up = args.warm_up if args.warm_up is not None else (1 if args.quick else 3)
    if max_tokens < 2 or warm_up < 1:
        raise ConfigError("expected --max-tokens of at least 2 and --warm-up of at least 1")
    from minisgl.cli.lab.server import engine_arguments, serving
    from minisgl.profiling.record import new_record
    from minisgl.profiling.spans import Span, write_trace
    from minisgl.profiling.timeline import render, timeline

    record = new_record("request", args.quick)
    arguments = engine_arguments(options.engine_config(args))
    with serving(*arguments, "--profile", str(args.out.absolute())) as server:
        answered, spans, facts = _capture(server, args.prompt, max_tokens, warm_up)
    found = timeline(spans, answered)
    later = max(answered.num_output - 1, 1)
    print(f"{args.model}: {answered.num_prompt} tokens in, {answered.num_output} out; {facts['route']}")
    print(render("time to first token", found.ttft))
    print(render(f"time a token, mean of {later}", found.decode, per=later))
    print(f"accounted for: {found.accounted:.1%}; the rest are gaps, between operators and in the server")
    whole = ("time to first token", answered.sent, answered.first), ("further tokens", answered.first, answered.last)
    spans += [Span(*span, "client", "request") for span in whole]
    trace = write_trace(args.out / "request.trace.json", spans, facts)
    print(f"trace for https://ui.perfetto.dev: {trace}")
    summary = found.summary() | facts | {"model": page.model_name(args.model), "trace": trace.name}
    page.finish(replace(record, rows=found.rows(), summary=summary), args.out)


def _capture(server: Server, prompt: str, max_tokens: int, warm_up: int) -> tuple[Answered, list[Span], dict[str, Any]]:
    """One captured request, after others as long; each begins otherwise, so that none finds its prefix cached."""
    from minisgl.profiling.graph_kernels import name_graph_kernels
    from minisgl.profiling.spans import Recorder, read_trace

    others = (f"{i}. {prompt}" for i in itertools.count(1))
    for text in itertools.islice(others, warm_up):
        server.stream(text, max_tokens, Recorder("client"))
    server.post("/profile/start")
    server.stream(next(others), max_tokens, Recorder("client"))  # a capture's first steps pay for its start
    for text in itertools.chain([prompt], itertools.islice(others, TRIES - 1)):
        recorder = Recorder("client")
        answered = server.stream(text, max_tokens, recorder)
        if answered.last > answered.first:
            break
    else:  # a client that reads late gets all tokens in one piece, if they are few
        raise MinisglError("the answer came in one piece, time after time; try a larger --max-tokens")
    path = Path(server.post("/profile/stop")["path"])
    spans, facts = read_trace(path)
    path.unlink()
    mine = [s for s in spans if s.end >= answered.sent and s.start <= answered.last]
    return answered, name_graph_kernels(mine) + recorder.spans(), facts
