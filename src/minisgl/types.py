"""The types that every other module shares. Standard library only."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class MinisglError(Exception):
    """Base of every error that minisgl raises on purpose; its text is meant for the user."""


class ConfigError(MinisglError):
    """An option, an environment value or a combination of them that can't work."""


class ModelError(MinisglError):
    """A model that can't be found, read or supported."""


class RequestError(MinisglError):
    """A request that can't be served as written (HTTP 400). `param` names the field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OverloadedError(MinisglError):
    """The queue is full (HTTP 503)."""


class EngineDeadError(MinisglError):
    """The engine process ended; nothing more can be served."""


class CommunicationError(MinisglError):
    """A collective that failed: another rank of the group ended, or the ranks don't make the same calls."""


class KernelError(MinisglError):
    """A kernel that can't be compiled, chosen or launched for the arguments given."""


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-text id, a stop token id or a stop string
    LENGTH = "length"  # max_tokens, the context or the pool is used up
    ABORT = "abort"  # the client gave up
    ERROR = "error"  # the engine could not go on with it


def check_ids(ids: Collection[int], vocab_size: int, param: str) -> None:
    """
    Raises:
        RequestError: one of these token ids, given as `param`, isn't in the vocabulary.
    """
    if ids and not (0 <= min(ids) and max(ids) < vocab_size):
        wrong = next(t for t in ids if not 0 <= t < vocab_size)
        raise RequestError(f"{param} has token id {wrong}, which is outside the vocabulary of {vocab_size}", param)


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # back in the queue, with the tokens it had
    FINISHED = "finished"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and re.search("[\ud800-\udfff]", value) is None


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_OPTIONAL = frozenset("temperature top_k top_p min_p repetition_penalty seed max_tokens".split())  # None has a meaning
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: _is_real(v) and 0 <= v <= 100, "a number from 0 (greedy) to 100"),
    "top_k": (lambda v: _is_int(v) and 0 <= v < 2**31, "a whole number below 2^31; 0 or -1 is off"),
    "top_p": (lambda v: _is_real(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "min_p": (lambda v: _is_real(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _is_real(v) and v > 0, "a number above 0"),
    "frequency_penalty": (lambda v: _is_real(v) and abs(v) <= 2, "a number from -2 to 2"),
    "presence_penalty": (lambda v: _is_real(v) and abs(v) <= 2, "a number from -2 to 2"),
    "seed": (lambda v: _is_int(v) and -(2**63) <= v < 2**63, "a 64-bit integer"),
    "max_tokens": (lambda v: _is_int(v) and v >= 0, "a whole number from 0"),
    "min_tokens": (lambda v: _is_int(v) and v >= 0, "a whole number from 0"),
    "stop": (lambda v: all(map(_is_text, v)), "strings of valid Unicode that aren't empty"),
    "stop_token_ids": (lambda v: all(_is_int(t) and t >= 0 for t in v), "token ids"),
    "top_logprobs": (lambda v: _is_int(v) and 0 <= v <= 20, "a whole number from 0 to 20"),
    "n": (lambda v: _is_int(v) and 1 <= v <= 128, "a whole number from 1 to 128"),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the tokens of one request.

    Fields left at None take the model's own default (its generation_config) and, failing that, the neutral value;
    `resolve` fills them in. `max_tokens=None` means what is left of the context.

    Raises:
        RequestError: a value out of range or of the wrong type, naming the field.
    """

    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # 0 or -1: off
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False  # the log-probability of every output token
    top_logprobs: int = 0  # and of this many most likely ones beside it
    prompt_logprobs: bool = False  # those of the prompt's tokens as well, `top_logprobs` beside each
    n: int = 1
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        for name, (fits, expected) in _RULES.items():
            value = getattr(self, name)
            if not (fits(value) or (value is None and name in _OPTIONAL)):
                raise RequestError(f"{name} is {value!r}; expected {expected}", name)
        for token, bias in self.logit_bias.items():
            if not (_is_int(token) and token >= 0 and _is_real(bias) and abs(bias) <= 100):
                expected = "token ids mapped to numbers from -100 to 100"
                raise RequestError(f"logit_bias is { ({token: bias})!r}; expected {expected}", "logit_bias")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", "min_tokens")

    def resolve(self, defaults: Mapping[str, float | int], eos_token_ids: Iterable[int]) -> SamplingParams:
        """What the engine gets: no None but `max_tokens` and `seed`, the model's end-of-text ids among the stop ids.

        Args:
            defaults: sampling defaults of the model, by this class's field names.
            eos_token_ids: ids that end a text, unless `ignore_eos`.
        """
        filled: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        for name, neutral in filled.items():
            own = getattr(self, name)
            filled[name] = defaults.get(name, neutral) if own is None else own
        extra = () if self.ignore_eos else tuple(eos_token_ids)
        stop_ids = tuple(dict.fromkeys(self.stop_token_ids + extra))
        return replace(self, stop_token_ids=stop_ids, **filled)

    def nth(self, k: int) -> SamplingParams:
        """The parameters of answer `k` of `n`: with a seed, each answer has its own (it wraps within 64 bits)."""
        if self.n == 1:
            return self
        seed = None if self.seed is None else (self.seed + k + 2**63) % 2**64 - 2**63
        return replace(self, n=1, seed=seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(slots=True, eq=False)
class Request:
    """One sequence as the engine sees it. The scheduler owns every field below `priority`.

    `tokens` holds the ids known to the host: the prompt, then what was sampled and collected. What changes with every
    step while a request runs is in the arrays of `engine.ledger`.
    """

    id: str
    tokens: array[int]  # array('i')
    params: SamplingParams
    priority: int = 0  # larger goes first

    num_prompt: int = 0
    max_total: int = 0  # prompt + output tokens at most
    stop_ids: frozenset[int] = frozenset()
    arrival: int = 0  # order of arrival, the tie-breaker everywhere
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_total: int = 0  # of a preempted request: its tokens, those included that were in flight
    num_cached: int = 0  # prompt tokens that came from the prefix cache at first admission
    num_preemptions: int = 0
    row: int = -1  # place in the runner's device-resident state while running
    pages: list[int] = field(default_factory=list)
    num_tree_pages: int = 0  # leading pages that the prefix tree owns
    node: int = -1  # locked node of the prefix tree
    num_bypassed: int = 0  # times a later request was admitted before this one

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.tokens)
        self.stop_ids = frozenset(self.params.stop_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the raw logits, before temperature and penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), most likely first


@dataclass(slots=True)
class TextDelta:
    """What one request gained: the unit that a stream hands to its client."""

    request_id: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of all prompt tokens but the first; once
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    error: str | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0  # so far


@dataclass(slots=True)
class Completion:
    """One of the `n` answers to a prompt."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The result for one prompt; `text`, `token_ids` and `finish_reason` are those of its first completion."""

    prompt: str | None
    prompt_token_ids: list[int]
    completions: list[Completion]
    num_cached: int = 0

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completions[0].finish_reason
