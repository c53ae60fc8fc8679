"""The requests of a load test: random prompts, alone or behind a prefix that many of them share."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from minisgl.cli.bench_options import Range

# Common words, each a token of its own (with the space before it) in most vocabularies.
_WORDS = (
    "the of and to in is was for on that with as by at from his it an were are which this also be has or had first "
    "one their its new after who they two her she been other when time during there into all may more years over only "
    "many most some city where such made used world about year part known number people work state between under then"
).split()

Prompt = list[int] | str
TOKEN_IDS = Range(0, 10_000)


@dataclass(frozen=True, slots=True)
class Plan:
    """How to draw requests. Lengths are in tokens; in words where prompts are text."""

    count: int
    input_len: Range  # of a prompt's own part
    output_len: Range
    shared_prefix: int = 0  # length of the part that prompts share
    prefix_groups: int = 1  # different shared parts; each prompt begins with one of them at random
    text: bool = False
    token_ids: Range = TOKEN_IDS
    seed: int = 0


def draw_requests(plan: Plan) -> list[tuple[Prompt, int]]:
    """Prompt and number of output tokens of each request; the same for the same plan."""
    rng = random.Random(plan.seed)
    prefixes = [_draw(plan, rng, plan.shared_prefix) for _ in range(plan.prefix_groups)] if plan.shared_prefix else [[]]
    requests: list[tuple[Prompt, int]] = []
    for _ in range(plan.count):
        parts = rng.choice(prefixes) + _draw(plan, rng, rng.randint(*plan.input_len))
        requests.append((" ".join(parts) if plan.text else parts, rng.randint(*plan.output_len)))
    return requests


def _draw(plan: Plan, rng: random.Random, length: int) -> list[Any]:
    if plan.text:
        return [rng.choice(_WORDS) for _ in range(length)]
    return [rng.randint(*plan.token_ids) for _ in range(length)]


def arrival_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are due: a Poisson process of `rate` a second, all at once if inf."""
    rng = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate) if rate != float("inf") else 0.0
    return times
