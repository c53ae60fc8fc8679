"""What crosses a process boundary: msgpack through msgspec, one message a step in each direction."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import msgspec

from minisgl.types import FinishReason, SamplingParams, TokenLogprob


class AddRequest(msgspec.Struct, tag="add", frozen=True):
    """A new request. `prompt` is int32 token ids in native byte order; `params` are resolved."""

    id: str
    prompt: bytes
    params: SamplingParams
    priority: int = 0


class FinishRequest(msgspec.Struct, tag="finish", frozen=True):
    """The output side saw a stop string: end the request, and send nothing more of it."""

    id: str


class AbortRequest(msgspec.Struct, tag="abort", frozen=True):
    """The client gave up. The engine answers with a terminal output unless the request has ended already."""

    id: str


class Profile(msgspec.Struct, tag="profile", frozen=True):
    """Capture spans from here on, for a file in `folder`; None: end that and write it. Answered by `Profiled`."""

    folder: str | None


Command = AddRequest | FinishRequest | AbortRequest | Profile


class Commands(msgspec.Struct, tag="commands", frozen=True):
    """API process to engine."""

    commands: list[Command]


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """API process to engine: end now; requests still running are dropped."""


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What one request gained in a step; the one with a `finish` is its last. Python's gc passes them over."""

    id: str
    tokens: list[int]
    logprobs: list[TokenLogprob] = []
    finish: FinishReason | None = None
    error: str | None = None
    num_cached: int = 0  # prompt tokens served from the prefix cache
    prompt_logprobs: list[TokenLogprob] = []  # with the request's first output: prompt positions 1 to the last


class EngineStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """State after a step; counters count from the engine's start."""

    num_waiting: int = 0
    num_running: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    num_cached_pages: int = 0  # held by the prefix cache, evictable ones included
    num_evictable_pages: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


class EngineReady(msgspec.Struct, tag="ready", frozen=True):
    """First message of an engine: what it will serve."""

    max_total_tokens: int  # prompt + output tokens of one request, at most
    vocab_size: int
    device: str
    dtype: str


class StepOutputs(msgspec.Struct, tag="step", frozen=True):
    """Engine to API process: one a step that produced something."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Profiled(msgspec.Struct, tag="profiled", frozen=True, omit_defaults=True):
    """A capture has begun, or ended with the file at `path`; or why it couldn't."""

    path: str | None = None
    error: str | None = None


class EngineFailed(msgspec.Struct, tag="failed", frozen=True):
    """Last message of an engine that can't go on."""

    error: str


class RankStage(msgspec.Struct, tag="stage", frozen=True, omit_defaults=True):
    """A rank tells that it is up (0 pages), has loaded its weights (KV pages it has room for), is ready (pages it has).

    Rank 0 answers the second with the fewest of all.
    """

    num_pages: int = 0


class RankStep(msgspec.Struct, tag="rank_step", frozen=True, omit_defaults=True):
    """Rank 0 to the others, before every step: what happened to requests since the last one.

    `checks` are checksums of rank 0's state, by what they cover; only where ranks are checked against one another.
    """

    commands: list[Command] = []
    checks: dict[str, int] = {}


class RankFailed(msgspec.Struct, tag="rank_failed", frozen=True, omit_defaults=True):
    """Last message of a rank. `lost_peer`: because it lost another one, which is then to blame."""

    error: str
    traceback: str = ""  # of an error that isn't for the user
    lost_peer: bool = False


ToEngine = Commands | Shutdown
FromEngine = EngineReady | StepOutputs | EngineFailed | Profiled
ToRank = RankStep | RankStage | Shutdown
FromRank = RankStage | RankFailed

encode: Callable[[msgspec.Struct], bytes] = msgspec.msgpack.Encoder().encode
decode_to_engine: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode
decode_to_rank: Callable[[bytes], ToRank] = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank: Callable[[bytes], FromRank] = msgspec.msgpack.Decoder(FromRank).decode


def pack_ids(ids: list[int] | array[int]) -> bytes:
    """Token ids as int32 bytes."""
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> array[int]:
    return array("i", data)
