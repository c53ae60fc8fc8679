"""The engine process: a step loop between two sockets, and the handle by which its parent starts and ends it.

On both sockets the receiver binds and the sender connects, without a high-water mark: so no send ever blocks. How much
can queue up is bounded by the number of requests that the parent lets in. The child never outlives its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import zmq

from minisgl import messages
from minisgl.config import EngineConfig
from minisgl.engine.children import PrivateFolder, exit_text, ignore_sigint
from minisgl.timing import collector_off, span
from minisgl.types import FinishReason, MinisglError, RequestError

if TYPE_CHECKING:
    from minisgl.engine.engine import Engine

logger = logging.getLogger(__name__)

ENGINE = "minisgl.engine.lead:make_engine"  # named, not imported, so that the parent doesn't load torch
PARENT_CHECK_MS = 1000
LINGER_MS = 1000  # for the last message of an engine that failed
_PR_SET_PDEATHSIG = 1


def engine_main(config: EngineConfig, commands: str, outputs: str, parent_pid: int, engine: str = ENGINE) -> None:
    """Body of the engine process. Ends with exit code 0 on `Shutdown`, 1 on any error after telling the parent.

    Args:
        config: its `model` is a path on this machine.
        commands: address to bind; `ToEngine` messages come in there.
        outputs: address to connect to; `FromEngine` messages go there.
        parent_pid: the process to die with.
        engine: `module:attribute` of a callable that makes an engine from the configuration: an `Engine`,
            or what has its public methods and attributes.
    """
    _die_with_parent(parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    context = zmq.Context()
    code = 1
    try:
        receiver, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for socket in (receiver, sender):
            socket.set_hwm(0)
        receiver.bind(commands)
        sender.connect(outputs)
        try:
            with collector_off():
                make = pkgutil.resolve_name(engine)
            with contextlib.closing(make(config)) as made:
                _run(made, receiver, sender, parent_pid)
            code = 0
        except Exception as error:
            text = str(error)
            if not isinstance(error, MinisglError):
                logger.exception("the engine can't go on")
                text = f"the engine failed: {type(error).__name__}: {error}"
            sender.send(messages.encode(messages.EngineFailed(text)))
    finally:
        context.destroy(linger=LINGER_MS)
    sys.exit(code)


def _die_with_parent(parent_pid: int) -> None:
    """Asks the kernel for SIGKILL when the parent ends. Ctrl-C reaches the whole terminal: the parent acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the call above
        os._exit(1)


def _run(engine: Engine, commands: zmq.Socket[bytes], outputs: zmq.Socket[bytes], parent_pid: int) -> None:
    """Steps until `Shutdown`; blocks on the socket while there is nothing to compute."""
    # A service manager may send SIGTERM to every process of the service. From here on the parent decides:
    # it drains, then sends Shutdown. Until here, while the model loads, SIGTERM ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    limits, config = (engine.max_total_tokens, engine.vocab_size), engine.config
    outputs.send(messages.encode(messages.EngineReady(*limits, config.device, config.dtype)))
    stats = engine.stats()
    outputs.send(messages.encode(messages.StepOutputs([], stats)))
    while True:
        if not engine.has_work:
            _wait(engine, commands, parent_pid)
        received = _drain(commands)
        if received is None:
            return
        for command in received:
            if isinstance(command, messages.Profile):
                outputs.send(messages.encode(_profile(engine, command)))
        with span("apply"):
            results = [refusal for c in received if (refusal := apply(engine, c)) is not None]
        with span("step"):
            results += engine.step()
        before, stats = stats, engine.stats()
        if results or stats != before:
            with span("send" if results else "send state"):
                outputs.send(messages.encode(messages.StepOutputs(results, stats)))


def _wait(engine: Engine, commands: zmq.Socket[bytes], parent_pid: int) -> None:
    """Until a command comes, or the engine has something to say: that a rank has died."""
    while not commands.poll(PARENT_CHECK_MS) and not engine.has_work:
        if os.getppid() != parent_pid:  # where the kernel doesn't tell us
            sys.exit(1)


def _drain(commands: zmq.Socket[bytes]) -> list[messages.Command] | None:
    """Every command that is there, without waiting; None once `Shutdown` is among them."""
    received: list[messages.Command] = []
    while True:
        try:
            message = messages.decode_to_engine(commands.recv(zmq.NOBLOCK))
        except zmq.Again:
            return received
        if isinstance(message, messages.Shutdown):
            return None
        received += message.commands


def apply(engine: Engine, command: messages.Command) -> messages.TokenOutput | None:
    """Hands `command` to the engine; a request that it refuses comes back as its terminal output."""
    match command:
        case messages.AddRequest():
            try:
                engine.add(command.id, messages.unpack_ids(command.prompt), command.params, command.priority)
            except RequestError as error:
                return messages.TokenOutput(command.id, [], finish=FinishReason.ERROR, error=str(error))
        case messages.FinishRequest():
            engine.finish(command.id)
        case messages.AbortRequest():
            engine.abort(command.id)
    return None


def _profile(engine: Engine, command: messages.Profile) -> messages.Profiled:
    """Starts or ends a capture, by an engine that was made for it (see `profiling.served`)."""
    capture: Callable[[str | None], messages.Profiled] | None = getattr(engine, "profile", None)
    if capture is None:
        return messages.Profiled(error="this engine wasn't started for profiling")
    return capture(command.folder)


class EngineProcess:
    """The engine's process as its parent holds it; a context manager, to be entered in the main thread.

    Entering starts the process, leaving ends it and removes the folder of the sockets. Whoever talks to the engine
    connects to `commands_address` and binds `outputs_address`.
    """

    def __init__(self, config: EngineConfig, engine: str = ENGINE) -> None:
        self._folder = PrivateFolder()
        self.commands_address = f"ipc://{self._folder.path}/commands"
        self.outputs_address = f"ipc://{self._folder.path}/outputs"
        args = (config, self.commands_address, self.outputs_address, os.getpid(), engine)
        self._process: BaseProcess = multiprocessing.get_context("spawn").Process(
            target=engine_main, args=args, name="minisgl-engine"
        )

    def __enter__(self) -> EngineProcess:
        with ignore_sigint():
            self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """A file descriptor that becomes readable when the process ends."""
        return self._process.sentinel

    def exit_text(self) -> str:
        """Why the process ended, as far as the system knows."""
        return exit_text(self._process, "the engine process")

    def stop(self, timeout: float = 2.0) -> None:
        """Waits `timeout` seconds for an engine that was told to shut down, then kills it. Idempotent."""
        if self._process.pid is not None:
            self._process.terminate()  # heeded only while the model loads
            self._process.join(timeout)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._folder.remove()
