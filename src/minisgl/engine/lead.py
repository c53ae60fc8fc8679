"""One model over several ranks: rank 0 leads, the others follow.

Nothing is scheduled twice in different ways: every rank has a whole engine, is told the same events in the same order,
and makes the same steps. What crosses is one small message a step. To whoever holds it, the group is one engine: a
replica of the model, of which there may be several some day.
"""

from __future__ import annotations

import gc
import os
import weakref
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from minisgl import messages
from minisgl.config import EngineConfig, resolve
from minisgl.distributed import TPGroup
from minisgl.engine.engine import Engine, rank_device
from minisgl.engine.process import apply
from minisgl.engine.ranks import Ranks
from minisgl.engine.scheduler import Scheduler
from minisgl.hardware import detect
from minisgl.kernels import cpu
from minisgl.models.hub import resolve_model
from minisgl.models.registry import read_config
from minisgl.models.sharding import check_tp_size
from minisgl.timing import phase
from minisgl.types import ConfigError, EngineDeadError, Request, SamplingParams

CHECK_VARIABLE = "MINISGL_CHECK_RANKS"


def make_engine(config: EngineConfig) -> Engine:
    """The engine of `config`, with as many ranks as it asks for.

    Raises:
        ConfigError, ModelError: it can't be built as configured.
        EngineDeadError: another rank couldn't.
    """
    return Engine(config) if config.tp_size == 1 else LeadEngine(config)


class LeadEngine(Engine):
    """Rank 0 of several, in this process; the others are processes that end with it.

    Every method that makes or takes requests raises EngineDeadError once a rank has failed, with that rank's reason.
    """

    def __init__(self, config: EngineConfig) -> None:
        path = resolve_model(config.model)
        config = resolve(replace(config, model=str(path)), detect())
        check_tp_size(read_config(path), config.tp_size)  # before anything is started
        self._checked = _checks_wanted()
        self._commands: list[messages.Command] = []  # since the last step
        self._ranks = ranks = Ranks(config)
        self._end = weakref.finalize(self, ranks.close)
        try:
            divide_threads(config)
            super().__init__(config, ranks.connect(lambda folder: _join(config, 0, folder)), ranks.agree)
            with phase("the other ranks' engines"):
                ranks.gather()
            ranks.busy = False
        except BaseException as error:
            self._give_up(error)
            raise

    def add(self, request_id: str, prompt: array[int], params: SamplingParams, priority: int = 0) -> None:
        """As `Engine.add`; a request that is refused here never reaches the other ranks."""
        if self._ranks.failure is not None:
            raise EngineDeadError(str(self._ranks.failure))
        super().add(request_id, prompt, params, priority)
        self._commands.append(messages.AddRequest(request_id, messages.pack_ids(prompt), params, priority))

    def finish(self, request_id: str) -> None:
        super().finish(request_id)
        self._commands.append(messages.FinishRequest(request_id))

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        self._commands.append(messages.AbortRequest(request_id))

    @property
    def has_work(self) -> bool:
        return super().has_work or self._ranks.failure is not None

    def step(self) -> list[messages.TokenOutput]:
        """As `Engine.step`, on every rank.

        Raises:
            EngineDeadError: another rank failed, or the engine is closed.
        """
        commands, self._commands = self._commands, []
        try:
            if self._ranks.failure is not None:
                raise self._ranks.failure
            self._ranks.busy = True
            self._ranks.send(messages.RankStep(commands, checksums(self.scheduler) if self._checked else {}))
            outputs = super().step()
            self._ranks.busy = False
            if self._ranks.failure is not None:  # the step ended without the others: its tokens are of no use
                raise self._ranks.failure
            return outputs
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """The ranks no longer agree: ends them. Raises what another rank failed of, if that is why `error` came."""
        try:
            self._ranks.explain(error)
        finally:
            self._ranks.close(0)

    def close(self) -> None:
        """Ends the other ranks; the engine can't be used any more. Idempotent."""
        super().close()
        self._end()


def follow(config: EngineConfig, rank: int, folder: Path, link: Connection) -> None:
    """What ranks 1, 2, … do: build the same engine, then repeat what rank 0 does until it says `Shutdown`.

    Raises:
        MinisglError: this rank can't be built, lost another one, or differs from rank 0.
        EOFError: rank 0 has ended.
    """

    def agree(num_pages: int) -> int:
        link.send_bytes(messages.encode(messages.RankStage(num_pages)))
        answer = messages.decode_to_rank(link.recv_bytes())
        if not isinstance(answer, messages.RankStage):
            raise EOFError
        return answer.num_pages

    divide_threads(config)
    link.send_bytes(messages.encode(messages.RankStage()))
    engine = Engine(config, _join(config, rank, folder), agree)
    gc.collect()
    gc.freeze()
    link.send_bytes(messages.encode(messages.RankStage(engine.scheduler.ledger.num_pages)))
    while isinstance(message := messages.decode_to_rank(link.recv_bytes()), messages.RankStep):
        for command in message.commands:
            refused = apply(engine, command)
            assert refused is None, f"rank {rank} refused what rank 0 took: {refused}"
        _compare(rank, engine.scheduler, message.checks)
        engine.step()
    engine.close()
    engine.tp.close()


def _join(config: EngineConfig, rank: int, folder: Path) -> TPGroup:
    with phase("connect"):
        return TPGroup.connect(rank, config.tp_size, rank_device(config, rank), folder)


def divide_threads(config: EngineConfig) -> None:
    """This rank's share of the CPU, unless OMP_NUM_THREADS says how many threads each has."""
    if config.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        count = max(1, detect().num_cores // config.tp_size)
        torch.set_num_threads(count)
        if cpu.available():
            cpu.native.cpu_set_threads(count)


# -- do the ranks agree? ---------------------------------------------------------------------------------------------


def _checks_wanted() -> bool:
    wanted = os.environ.get(CHECK_VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise ConfigError(f"{CHECK_VARIABLE} is {wanted!r}; expected 1 (compare the ranks before every step) or 0")
    return wanted == "1"


def checksums(scheduler: Scheduler) -> dict[str, int]:
    """CRC-32 of what ranks must agree on before a step, by what it is."""

    def ids(requests: Iterable[Request]) -> int:
        return zlib.crc32("\n".join(r.id for r in requests).encode())

    ledger, everybody = scheduler.ledger, scheduler.running + scheduler.waiting
    counts = [n for r in everybody for n in (len(r.tokens), r.num_total, r.num_tree_pages, r.row)]
    return {
        "step": scheduler.step,
        "free pages": zlib.crc32(array("i", ledger.free)),
        "cached pages": ledger.cache.num_pages if ledger.cache is not None else 0,
        "running requests": ids(scheduler.running),
        "waiting requests": ids(scheduler.waiting),
        "lengths": zlib.crc32(array("i", [*counts, *(int(ledger.computed[r.row]) for r in scheduler.running)])),
        "last tokens": zlib.crc32(array("i", [r.tokens[-1] for r in everybody])),
        "pages of requests": zlib.crc32(array("i", [p for r in everybody for p in r.pages])),
    }


def _compare(rank: int, scheduler: Scheduler, expected: dict[str, int]) -> None:
    if expected:
        own = checksums(scheduler)
        differ = [name for name, value in expected.items() if own[name] != value]
        if differ:
            text = f"rank {rank} differs from rank 0 before step {scheduler.step}: {', '.join(differ)}"
            raise EngineDeadError(f"{CHECK_VARIABLE}: {text}")
