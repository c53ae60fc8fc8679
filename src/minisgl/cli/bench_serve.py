"""`minisgl bench serve`: load on a server with the OpenAI API, and what its clients feel of it."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.cli.bench_options import Range, id_range, length_range
from minisgl.cli.bench_record import environment, save
from minisgl.types import ConfigError, MinisglError

if TYPE_CHECKING:
    from minisgl.cli.load_http import Endpoint
    from minisgl.cli.load_prompts import Plan
    from minisgl.cli.load_run import Client, Request

HELP = "Put load on any OpenAI server, and measure what its clients feel."
LATE_S = 0.05  # a client that starts requests later than this is too slow for the rate asked for


def add_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:1919", help="with or without /v1 (default: %(default)s)")
    server.add_argument("--model", help="its name there (default: the first that the server lists)")
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    server.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    server.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one answer (default: 600)")
    load = parser.add_argument_group("load")
    pace = load.add_mutually_exclusive_group()
    pace.add_argument(
        "--rate", type=float, metavar="R", help="requests a second, at random; inf: all at once (default)"
    )
    pace.add_argument("--concurrency", type=int, metavar="N", help="requests under way at any time")
    load.add_argument("--num-requests", type=int, default=100, metavar="N", help="(default: 100)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", choices=("ids", "text"), help="token ids (default), or words (default for chat)")
    prompts.add_argument(
        "--input-len", type=length_range, default=Range(512, 512), metavar="A:B", help="(default: 512)"
    )
    prompts.add_argument(
        "--output-len", type=length_range, default=Range(128, 128), metavar="A:B", help="(default: 128)"
    )
    prompts.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens before that, shared by all")
    prompts.add_argument("--prefix-groups", type=int, default=1, metavar="N", help="different shared prefixes")
    prompts.add_argument("--token-ids", type=id_range, default=Range(0, 10_000), metavar="A:B", help="(0:10000)")
    prompts.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: 0)")
    prompts.add_argument("--stop-at-eos", action="store_true", help="don't send ignore_eos, which not all servers know")
    prompts.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of requests")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="goals, as in ttft:200 tpot:50 e2e:9000"
    )
    result.add_argument("--tokenizer", metavar="MODEL", help="to count tokens, if the server sends no usage")
    result.add_argument("--save", type=Path, metavar="FILE", help="append the result as a line of JSON")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a JSON object")
    return value


def run(args: argparse.Namespace) -> None:
    """Prints the figures.

    Raises:
        MinisglError: wrong options, no server, or not one request that was answered.
    """
    import asyncio

    from minisgl.cli.load_http import Endpoint
    from minisgl.cli.load_metrics import parse_goals, summarise
    from minisgl.cli.load_prompts import draw_requests

    _check(args)
    goals, endpoint, plan = parse_goals(args.goodput), Endpoint.parse(args.url, args.api_key), _plan(args)
    save(args.save)
    _raise_file_limit()
    client, samples = asyncio.run(_load(args, endpoint, draw_requests(plan)))
    summary = summarise(samples, goals)
    if summary["failed"] == summary["requests"]:
        raise MinisglError(f"no request was answered: {next(iter(summary['errors']))}")
    late = max(client.lateness, default=0.0) if args.rate not in (None, math.inf) else 0.0
    for line in _told(args, client, summary, late):
        print(line)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for name in ("action", "command", "api_key", "save"):
        settings.pop(name, None)
    settings |= {"model": client.fields["model"], "rate": str(args.rate)}  # JSON has no infinity
    save(
        args.save, environment() | {"bench": "serve", "settings": settings, **summary, "late_ms": round(1e3 * late, 3)}
    )


def _check(args: argparse.Namespace) -> None:
    if args.rate is None and args.concurrency is None:
        args.rate = math.inf
    if args.rate is not None and not args.rate > 0:
        raise ConfigError(f"rate is {args.rate}; expected a number above 0, or inf")
    for name in ("concurrency", "num_requests", "prefix_groups"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name.replace('_', '-')} is {value}; expected at least 1")
    if args.shared_prefix < 0:
        raise ConfigError(f"shared-prefix is {args.shared_prefix}; expected 0 or more")
    if not args.timeout > 0:
        raise ConfigError(f"timeout is {args.timeout}; expected seconds above 0")
    if args.endpoint == "chat" and args.prompt == "ids":
        raise ConfigError("chats take no token ids; use --prompt text, or --endpoint completions")


def _plan(args: argparse.Namespace) -> Plan:
    from minisgl.cli.load_prompts import Plan

    return Plan(
        args.num_requests + 1,  # one to warm up, whose prompt is no other's
        args.input_len,
        args.output_len,
        args.shared_prefix,
        args.prefix_groups,
        args.prompt == "text" or args.endpoint == "chat",
        args.token_ids,
        args.seed,
    )


def _raise_file_limit() -> None:
    """A connection is an open file, and the usual limit of 1,024 is soon reached."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _load(args: argparse.Namespace, endpoint: Endpoint, requests: list[Request]) -> tuple[Client, list[Any]]:
    """Warms up with one request, then runs all of them."""
    from rich.console import Console
    from rich.progress import Progress

    client = await _client(args, endpoint)
    probe = await client.ask(requests.pop()[0], 2)
    if probe.error is not None:
        raise MinisglError(f"{args.url} can't answer a request like those asked for: {probe.error}")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Requests", total=len(requests))
        client.on_done = lambda: bar.advance(task)
        if args.concurrency is not None:
            return client, await client.at_concurrency(requests, args.concurrency)
        return client, await client.at_rate(requests, args.rate, args.seed)


async def _client(args: argparse.Namespace, endpoint: Endpoint) -> Client:
    from minisgl.cli.load_http import HttpError, get_json
    from minisgl.cli.load_run import Client

    model = args.model
    if model is None:
        try:
            model = (await get_json(endpoint, "/models"))["data"][0]["id"]
        except HttpError as error:
            raise MinisglError(f"{args.url} doesn't list its models: {error}; is it the server's address?") from None
        except (KeyError, IndexError, TypeError):
            raise MinisglError(f"{args.url} lists no models; name one with --model") from None
    fields = {"model": model, "temperature": args.temperature} | ({} if args.stop_at_eos else {"ignore_eos": True})
    tokenizer = None
    if args.tokenizer is not None:
        from minisgl.models.hub import resolve_model
        from minisgl.text import load_text

        tokenizer = load_text(resolve_model(args.tokenizer)).require_tokenizer()
    return Client(endpoint, fields | args.extra_body, args.endpoint == "chat", args.timeout, tokenizer)


# -- what is told --------------------------------------------------------------------------------------------------


def _told(args: argparse.Namespace, client: Client, summary: dict[str, Any], late: float) -> list[str]:
    pace = f"{args.concurrency} at a time" if args.concurrency else f"at {args.rate:g}/s"
    lines = [
        f"{args.url}, {client.fields['model']}: {summary['requests']} requests {pace}, "
        f"{summary['failed']} failed, {summary['seconds']:.2f} s"
    ]
    lines += [f"  {count} × {reason}" for reason, count in summary["errors"].items()]
    lines += [_rates(summary), "", f"{'ms':6}{'mean':>12}{'median':>12}{'p90':>12}{'p99':>12}"]
    for name in ("ttft", "tpot", "itl", "e2e"):
        spread = summary[f"{name}_ms"]
        values = "".join(f"{value:12,.2f}" for value in spread.values()) if spread else f"{'–':>12}" * 4
        lines.append(f"{name.upper():6}{values}")
    if goodput := summary.get("goodput"):
        goals = ", ".join(f"{name} {value:g} ms" for name, value in goodput["goals_ms"].items())
        lines += [
            "",
            f"goodput {goodput['requests_per_second']:.2f} requests/s ({goodput['fraction']:.0%}) within {goals}",
        ]
    return lines + _warnings(summary, late)


def _rates(summary: dict[str, Any]) -> str:
    text = f"{summary['requests_per_second']:.2f} requests/s"
    if summary["output_tokens_per_second"] is not None:
        text += f", {summary['output_tokens_per_second']:,.0f} tok/s out"
    if summary["tokens_per_second"] is not None:
        text += f", {summary['tokens_per_second']:,.0f} tok/s in and out"
    if summary["cached_tokens"] is not None and summary["prompt_tokens"]:
        text += f", {summary['cached_tokens'] / summary['prompt_tokens']:.0%} of the prompt tokens cached"
    return text


def _warnings(summary: dict[str, Any], late: float) -> list[str]:
    lines = []
    if summary["output_tokens"] is None:
        lines.append("the server sends no usage, so tokens were not counted; --tokenizer MODEL counts them here")
    per_chunk = summary["tokens_per_chunk"]
    if per_chunk is not None and not 0.9 < per_chunk < 1.1:
        lines.append(
            f"a chunk holds {per_chunk:.2f} tokens on average, so ITL is not the time between tokens; see TPOT"
        )
    if summary["ttft_ms"] is None:
        lines.append("no answer had text in it, so there is no time of a first token")
    if late > LATE_S:
        lines.append(f"this client started requests up to {1e3 * late:.0f} ms late: it is too slow for this rate")
    return [f"note: {line}" for line in lines]
