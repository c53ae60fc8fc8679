"""The server's end of the engine: requests go out as batched commands, outputs come back as streams of text."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import zmq
import zmq.asyncio

from minisgl import messages
from minisgl.server.metrics import Metrics
from minisgl.server.stream import Stream
from minisgl.text.output import OutputProcessor
from minisgl.timing import span
from minisgl.types import EngineDeadError, FinishReason, MinisglError, OverloadedError, RequestError, SamplingParams

LAST_WORDS_S = 0.2  # what an engine said before it died arrives within this time
LINGER_MS = 200  # for the message that ends the engine


class EngineHandle(Protocol):
    """An engine process, as far as the server needs to know it."""

    @property
    def commands_address(self) -> str: ...
    @property
    def outputs_address(self) -> str: ...
    @property
    def sentinel(self) -> int: ...  # file descriptor, readable once the process has ended
    def exit_text(self) -> str: ...


@dataclass(slots=True)
class _Sequence:
    """An answer under way: who reads it, its place among the answers of its request, and when it last gained."""

    stream: Stream
    index: int
    since: float = field(default_factory=time.perf_counter)
    begun: bool = False


class AsyncEngineClient:
    """Talks to one engine process. Create, use and close it inside one event loop, with `run` as a task beside.

    Args:
        engine: the process; the client connects to its sockets and watches its sentinel.
        processor: turns token outputs into text.
        max_queue: sequences waiting or running, at most.
    """

    def __init__(self, engine: EngineHandle, processor: OutputProcessor, max_queue: int) -> None:
        self._engine = engine
        self._processor = processor
        self._max_queue = max_queue
        self._open: dict[str, _Sequence] = {}  # by the id that the engine knows
        self._outbox: list[messages.Command] = []
        self._failure: MinisglError | None = None
        self._captures: deque[asyncio.Future[messages.Profiled]] = deque()  # asked of the engine, in order
        self.ready: asyncio.Future[messages.EngineReady] = asyncio.get_running_loop().create_future()
        self.stats = messages.EngineStats()
        self.metrics = Metrics(lambda: self.stats)
        self._context = zmq.Context()
        self._outputs = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._outputs.set_hwm(0)
        self._outputs.bind(engine.outputs_address)
        self._commands = self._context.socket(zmq.PUSH)  # sends never wait, so it needn't be asyncio's
        self._commands.set_hwm(0)
        self._commands.connect(engine.commands_address)

    @property
    def num_open(self) -> int:
        """Sequences that haven't ended."""
        return len(self._open)

    @contextmanager
    def generate(
        self, request_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams, priority: int = 0
    ) -> Iterator[Stream]:
        """Starts `params.n` sequences a prompt; sequence i * n + j is answer j to prompt i.

        What still runs when the context is left is aborted.

        Args:
            prompts: token ids, at least one and within the model's vocabulary.
            params: resolved.

        Raises:
            OverloadedError: the queue is full.
            EngineDeadError: the engine has ended.
            RequestError: more sequences than the queue has room for, or stop strings without a tokenizer.
        """
        ids = [f"{request_id}-{i}" for i in range(len(prompts) * params.n)]
        self._admit(len(ids))
        stream = Stream(len(ids))
        try:
            for index, sequence in enumerate(ids):
                prompt, own = prompts[index // params.n], params.nth(index % params.n)
                self._processor.add(sequence, prompt, own)
                self._open[sequence] = _Sequence(stream, index)
                self._push(messages.AddRequest(sequence, messages.pack_ids(list(prompt)), own, priority))
            yield stream
        finally:
            for index in tuple(stream.open):
                self._abort(ids[index])

    def abort(self, request_id: str) -> int:
        """Ends what still runs of a request of `generate`, with finish reason ABORT.

        Returns:
            The number of sequences ended; 0 for a request that has ended, or never was.
        """
        ids = [sequence for sequence in self._open if sequence.rpartition("-")[0] == request_id]
        for sequence in ids:
            self._abort(sequence)
        return len(ids)

    async def profile(self, folder: str | None) -> messages.Profiled:
        """Has the engine begin a capture of spans, or with None end it; its answer.

        Raises:
            EngineDeadError: the engine has ended.
        """
        self._admit(0)
        answer: asyncio.Future[messages.Profiled] = asyncio.get_running_loop().create_future()
        self._captures.append(answer)
        self._push(messages.Profile(folder))
        return await asyncio.shield(answer)  # the answer comes, whether or not somebody still waits

    def fail(self, error: MinisglError) -> None:
        """Ends every stream with `error` and lets no new one in."""
        self._failure = self._failure or error
        for sequence in self._open.values():
            sequence.stream.fail(error)
        while self._captures:
            self._captures.popleft().set_result(messages.Profiled(error=str(error)))

    async def run(self) -> None:
        """Delivers outputs until the engine ends, which it raises.

        Raises:
            EngineDeadError: with the engine's own words if it had any.
        """
        receive, watch = asyncio.create_task(self._receive()), asyncio.create_task(self._watch())
        try:
            await asyncio.wait({receive, watch}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({receive}, timeout=LAST_WORDS_S)
            if receive.done():
                await receive
            raise EngineDeadError(self._engine.exit_text())
        except Exception as error:
            self.fail(error if isinstance(error, MinisglError) else EngineDeadError(f"the server failed: {error!r}"))
            raise
        finally:
            receive.cancel()
            watch.cancel()

    def close(self) -> None:
        """Tells the engine to end, and closes the sockets. Idempotent."""
        self.fail(EngineDeadError("the server is shutting down"))
        self._send(messages.encode(messages.Shutdown()))
        self._outputs.close(linger=0)
        self._commands.close(linger=LINGER_MS)
        self._context.term()

    def _admit(self, num_sequences: int) -> None:
        if self._failure is not None:
            raise EngineDeadError(str(self._failure))
        if num_sequences > self._max_queue:
            raise RequestError(f"the request asks for {num_sequences} sequences; at most {self._max_queue} are allowed")
        if self.num_open + num_sequences > self._max_queue:
            raise OverloadedError(f"{self.num_open} requests are waiting or running, as many as allowed; try later")

    def _abort(self, sequence: str) -> None:
        own, delta = self._open.pop(sequence, None), self._processor.abort(sequence)
        if own is not None and delta is not None:
            own.stream.put(own.index, delta)
            self.metrics.ended(FinishReason.ABORT)
        self._push(messages.AbortRequest(sequence))

    def _push(self, command: messages.Command) -> None:
        """Queues `command`; all of one turn of the event loop travel in one message."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(command)

    def _flush(self) -> None:
        commands, self._outbox = self._outbox, []
        with span("send to engine"):
            self._send(messages.encode(messages.Commands(commands)))

    def _send(self, message: bytes) -> None:
        if not self._commands.closed:
            self._commands.send(message, zmq.NOBLOCK)

    async def _receive(self) -> None:
        while True:
            message = messages.decode_from_engine(await self._outputs.recv())
            match message:
                case messages.EngineReady():
                    self.ready.set_result(message)
                case messages.StepOutputs():
                    self._deliver(message)
                case messages.Profiled():
                    if self._captures:
                        self._captures.popleft().set_result(message)
                case messages.EngineFailed():
                    raise EngineDeadError(message.error)

    async def _watch(self) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._engine.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._engine.sentinel)

    def _deliver(self, step: messages.StepOutputs) -> None:
        self.stats = step.stats
        with span("detokenize"):
            deltas, stopped = self._processor.process(step.outputs)
        for sequence in stopped:
            self._push(messages.FinishRequest(sequence))
        for delta in deltas:
            own = self._open[delta.request_id]
            if delta.token_ids:
                own.since, own.begun = self.metrics.token(own.since, not own.begun), True
            if delta.finish_reason is not None:
                del self._open[delta.request_id]
                self.metrics.ended(delta.finish_reason)
            own.stream.put(own.index, delta)
