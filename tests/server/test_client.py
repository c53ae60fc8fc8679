"""AsyncEngineClient against an engine played by the test, over the real sockets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from minisgl.messages import (
    AbortRequest,
    AddRequest,
    Commands,
    EngineFailed,
    EngineReady,
    EngineStats,
    Shutdown,
    StepOutputs,
    ToEngine,
    TokenOutput,
    decode_to_engine,
    encode,
    unpack_ids,
)
from minisgl.server.client import AsyncEngineClient
from minisgl.server.stream import Stream
from minisgl.text import OutputProcessor
from minisgl.types import (
    EngineDeadError,
    FinishReason,
    OverloadedError,
    RequestError,
    SamplingParams,
    TextDelta,
)

PARAMS = SamplingParams().resolve({}, ())


class PlayedEngine:
    """The engine's end of both sockets; `die` makes the sentinel readable."""

    def __init__(self, folder: Path) -> None:
        self.commands_address = f"ipc://{folder}/commands"
        self.outputs_address = f"ipc://{folder}/outputs"
        self.sentinel, self._alive = os.pipe()
        self._context = zmq.asyncio.Context()
        self._commands, self._outputs = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        self._commands.bind(self.commands_address)
        self._outputs.connect(self.outputs_address)

    def exit_text(self) -> str:
        return "the engine process was killed by the test"

    async def heard(self) -> ToEngine:
        return decode_to_engine(await asyncio.wait_for(self._commands.recv(), 10))

    async def commands(self) -> list[Any]:
        message = await self.heard()
        assert isinstance(message, Commands)
        return message.commands

    async def say(self, *outputs: TokenOutput, stats: EngineStats = EngineStats()) -> None:
        await self._outputs.send(encode(StepOutputs(list(outputs), stats)))

    async def fail(self, error: str) -> None:
        await self._outputs.send(encode(EngineFailed(error)))

    async def get_ready(self) -> None:
        await self._outputs.send(encode(EngineReady(100, 100, "cpu", "float32")))

    def die(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def close(self) -> None:
        self.die()
        os.close(self.sentinel)
        self._context.destroy(linger=0)


@dataclass
class Setting:
    engine: PlayedEngine
    client: AsyncEngineClient
    run: asyncio.Task[None]


@asynccontextmanager
async def setting(folder: Path, max_queue: int = 10) -> AsyncIterator[Setting]:
    engine = PlayedEngine(folder)
    client = AsyncEngineClient(engine, OutputProcessor(None), max_queue)
    run = asyncio.create_task(client.run())
    try:
        await engine.get_ready()
        assert (await asyncio.wait_for(client.ready, 10)).vocab_size == 100
        yield Setting(engine, client, run)
    finally:
        run.cancel()
        client.close()
        engine.close()


Scenario = Callable[[Path], Coroutine[Any, Any, None]]


def run_async(scenario: Scenario) -> Callable[[Path], None]:
    """A test out of a coroutine."""

    def test(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(scenario(tmp_path), 60))

    test.__name__ = scenario.__name__
    return test


async def read(stream: Stream) -> tuple[int, TextDelta]:
    return await asyncio.wait_for(anext(stream), 10)


@run_async
async def test_client_sends_the_request_and_yields_what_comes(folder: Path) -> None:
    async with setting(folder) as s:
        with s.client.generate("a", [[1, 2, 3]], PARAMS, priority=7) as stream:
            [add] = await s.engine.commands()
            assert isinstance(add, AddRequest)
            assert (list(unpack_ids(add.prompt)), add.priority) == ([1, 2, 3], 7)
            await s.engine.say(TokenOutput(add.id, [4]))
            index, delta = await read(stream)
            assert (index, delta.token_ids, delta.num_prompt) == (0, [4], 3)
            await s.engine.say(TokenOutput(add.id, [5], finish=FinishReason.LENGTH))
            _, delta = await read(stream)
            assert delta.finish_reason is FinishReason.LENGTH
            with pytest.raises(StopAsyncIteration):
                await read(stream)
        assert s.client.num_open == 0


@run_async
async def test_client_sends_one_message_for_all_that_begins_in_one_turn(folder: Path) -> None:
    async with setting(folder) as s:
        async with AsyncExitStack() as stack:
            for i in range(3):
                stack.enter_context(s.client.generate(f"r{i}", [[i]], PARAMS))
            assert len(await s.engine.commands()) == 3
        commands = await s.engine.commands()
        assert [type(c) for c in commands] == [AbortRequest] * 3


@run_async
async def test_client_gives_every_answer_to_a_prompt_its_own_seed(folder: Path) -> None:
    params = SamplingParams(n=2, seed=5).resolve({}, ())
    async with setting(folder) as s:
        with s.client.generate("a", [[1], [2]], params):
            adds = await s.engine.commands()
        assert [list(unpack_ids(a.prompt)) for a in adds] == [[1], [1], [2], [2]]
        assert [a.params.seed for a in adds] == [5, 6, 5, 6]
        assert all(a.params.n == 1 for a in adds)


@run_async
async def test_client_merges_what_a_slow_reader_left_waiting(folder: Path) -> None:
    async with setting(folder) as s:
        with s.client.generate("slow", [[1]], PARAMS) as slow, s.client.generate("quick", [[1]], PARAMS) as quick:
            slow_id, quick_id = (c.id for c in await s.engine.commands())
            for token in range(50):
                await s.engine.say(TokenOutput(slow_id, [token]), TokenOutput(quick_id, [token]))
                assert (await read(quick))[1].token_ids == [token]
            assert (await read(slow))[1].token_ids == list(range(50))


@run_async
async def test_client_aborts_what_still_runs_when_its_reader_leaves(folder: Path) -> None:
    async with setting(folder) as s:
        with s.client.generate("a", [[1], [2]], PARAMS) as stream:
            first, second = (c.id for c in await s.engine.commands())
            await s.engine.say(TokenOutput(first, [4], finish=FinishReason.STOP))
            await read(stream)
        assert await s.engine.commands() == [AbortRequest(second)]
        assert s.client.num_open == 0
        await s.engine.say(TokenOutput(second, [], finish=FinishReason.ABORT), stats=EngineStats(steps=9))
        while s.client.stats.steps != 9:  # its last output has nobody to go to, and does no harm
            await asyncio.sleep(0.01)


@run_async
async def test_client_raises_what_the_engine_refused(folder: Path) -> None:
    async with setting(folder) as s:
        with s.client.generate("a", [[1]], PARAMS) as stream:
            [add] = await s.engine.commands()
            await s.engine.say(TokenOutput(add.id, [], finish=FinishReason.ERROR, error="it can't be"))
            with pytest.raises(RequestError, match="it can't be"):
                await read(stream)
        assert s.client.num_open == 0


@run_async
async def test_client_lets_no_more_in_than_the_queue_holds(folder: Path) -> None:
    async with setting(folder, max_queue=2) as s:
        with s.client.generate("a", [[1]], PARAMS):
            with (
                pytest.raises(OverloadedError, match="1 requests are waiting"),
                s.client.generate("b", [[1], [2]], PARAMS),
            ):
                pass
            with pytest.raises(RequestError, match="at most 2"), s.client.generate("c", [[1]] * 3, PARAMS):
                pass
        with s.client.generate("d", [[1], [2]], PARAMS):
            assert s.client.num_open == 2


@run_async
async def test_client_ends_streams_with_the_engines_last_words(folder: Path) -> None:
    async with setting(folder) as s:
        with s.client.generate("a", [[1]], PARAMS) as stream:
            [add] = await s.engine.commands()
            await s.engine.say(TokenOutput(add.id, [4]))
            await s.engine.fail("out of paper")
            s.engine.die()
            assert (await read(stream))[1].token_ids == [4]
            with pytest.raises(EngineDeadError, match="out of paper"):
                await read(stream)
        with pytest.raises(EngineDeadError, match="out of paper"):
            await s.run
        with pytest.raises(EngineDeadError, match="out of paper"), s.client.generate("b", [[1]], PARAMS):
            pass


@run_async
async def test_client_notices_an_engine_that_died_without_a_word(folder: Path) -> None:
    async with setting(folder) as s:
        with s.client.generate("a", [[1]], PARAMS) as stream:
            s.engine.die()
            with pytest.raises(EngineDeadError, match="killed by the test"):
                await read(stream)


@run_async
async def test_client_tells_the_engine_to_shut_down_when_it_closes(folder: Path) -> None:
    async with setting(folder) as s:
        s.client.close()
        assert await s.engine.heard() == Shutdown()


@run_async
async def test_client_keeps_the_latest_counts(folder: Path) -> None:
    async with setting(folder) as s:
        await s.engine.say(stats=EngineStats(num_running=3, steps=1))
        await s.engine.say(stats=EngineStats(num_running=2, steps=2))
        while s.client.stats.steps != 2:
            await asyncio.sleep(0.01)
        assert s.client.stats.num_running == 2
