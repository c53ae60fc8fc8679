"""The engine process over its real sockets, with an engine that needs no model."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_engine
import pytest
import zmq

from minisgl.config import EngineConfig
from minisgl.engine.process import EngineProcess
from minisgl.messages import (
    AbortRequest,
    AddRequest,
    Command,
    Commands,
    EngineFailed,
    EngineReady,
    FinishRequest,
    FromEngine,
    Shutdown,
    StepOutputs,
    decode_from_engine,
    encode,
    pack_ids,
)
from minisgl.types import FinishReason, SamplingParams

TIMEOUT_MS = 20_000


class Parent:
    """The parent's end of both sockets."""

    def __init__(self, process: EngineProcess, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.process = process
        self._commands, self._outputs = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        for socket in (self._commands, self._outputs):
            socket.set(zmq.SNDTIMEO, TIMEOUT_MS)
            socket.set(zmq.RCVTIMEO, TIMEOUT_MS)
        self._commands.connect(process.commands_address)
        self._outputs.bind(process.outputs_address)

    def send(self, *commands: Command) -> None:
        self._commands.send(encode(Commands(list(commands))))

    def shut_down(self) -> None:
        self._commands.send(encode(Shutdown()))

    def receive(self) -> FromEngine:
        return decode_from_engine(self._outputs.recv())

    def step(self) -> StepOutputs:
        message = self.receive()
        assert isinstance(message, StepOutputs)
        return message

    def exit_code(self, timeout: float = 10.0) -> int | None:
        self.process._process.join(timeout)
        return self.process._process.exitcode


@contextmanager
def start(model: str = "slow") -> Iterator[Parent]:
    with connected(EngineProcess(EngineConfig(model=model), fake_engine.NAME)) as parent:
        yield parent


@contextmanager
def connected(process: EngineProcess) -> Iterator[Parent]:
    with process:
        context = zmq.Context()
        parent = Parent(process, context)
        try:
            yield parent
        finally:
            parent.shut_down()
            context.destroy(linger=200)


@contextmanager
def ready(model: str = "slow") -> Iterator[Parent]:
    with start(model) as parent:
        assert isinstance(parent.receive(), EngineReady)
        assert parent.step().stats.num_free_pages == fake_engine.NUM_PAGES
        yield parent


def add(request_id: str, *prompt: int, max_tokens: int | None = None) -> AddRequest:
    return AddRequest(request_id, pack_ids(list(prompt)), SamplingParams(max_tokens=max_tokens))


def test_engine_process_says_what_it_serves() -> None:
    with start() as parent:
        limits = parent.receive()
        assert limits == EngineReady(100_000, fake_engine.VOCAB_SIZE, "cpu", "float32")


def test_engine_process_answers_a_request_a_step_a_message() -> None:
    with ready() as parent:
        parent.send(add("a", 5, 6, 7, max_tokens=4))
        steps = [parent.step() for _ in range(4)]
        assert [s.outputs[0].tokens for s in steps] == [[5], [6], [7], [5]]
        assert [s.outputs[0].finish for s in steps] == [None, None, None, FinishReason.LENGTH]
        assert steps[0].stats.num_running == 1
        assert steps[-1].stats.num_running == 0


def test_engine_process_applies_all_commands_of_a_message_before_one_step() -> None:
    with ready() as parent:
        parent.send(add("a", 1), add("b", 2), add("gone", 3), FinishRequest("gone"))
        step = parent.step()
        assert {o.id: o.tokens for o in step.outputs} == {"a": [1], "b": [2]}


def test_engine_process_answers_a_refused_request_with_its_terminal_output() -> None:
    with ready() as parent:
        parent.send(add("bad", fake_engine.REFUSED), add("good", 1))
        outputs = {o.id: o for o in parent.step().outputs}
        assert outputs["bad"].finish is FinishReason.ERROR
        assert outputs["bad"].error == f"token {fake_engine.REFUSED} is refused on purpose"
        assert outputs["good"].tokens == [1]


def test_engine_process_frees_an_aborted_request_in_the_step_that_hears_of_it() -> None:
    with ready() as parent:
        parent.send(add("a", 1))
        parent.step()
        parent.send(AbortRequest("a"))
        seen = [parent.step()]
        while seen[-1].stats.num_running:
            seen.append(parent.step())
        assert seen[-1].outputs[0].finish is FinishReason.ABORT
        assert seen[-1].stats.num_free_pages == fake_engine.NUM_PAGES


@pytest.mark.parametrize("overlap", [False, True])
def test_engine_process_frees_pages_within_a_step_of_an_abort(tiny_model: Path, overlap: bool) -> None:
    config = EngineConfig(model=str(tiny_model), dummy_weights=True, num_pages=100, overlap=overlap)
    with connected(EngineProcess(config)) as parent:
        assert isinstance(parent.receive(), EngineReady)
        params = SamplingParams().resolve({}, ())
        parent.send(*(AddRequest(name, pack_ids([first] * 40), params) for name, first in (("a", 1), ("b", 2))))
        while (step := parent.step()).stats.output_tokens < 10:
            pass
        held = _held(step)
        parent.send(AbortRequest("a"))
        while (step := parent.step()) and not any(o.id == "a" and o.finish for o in step.outputs):
            pass
        assert step.stats.num_running == 1
        ended = step.stats.steps
        while _held(step) > held // 2 + 1:  # the other one grows by a page now and then
            step = parent.step()
        assert step.stats.steps <= ended + 1


def _held(step: StepOutputs) -> int:
    """Pages that running requests hold."""
    return step.stats.num_pages - step.stats.num_free_pages - step.stats.num_evictable_pages


def test_engine_process_tells_its_counts_when_a_finish_changes_them() -> None:
    with ready() as parent:
        parent.send(add("a", 1))
        parent.step()
        parent.send(FinishRequest("a"))
        while (step := parent.step()).outputs:
            pass
        assert step.stats.num_running == 0


def test_engine_process_rests_when_there_is_nothing_to_do() -> None:
    with ready("fast") as parent:
        before = _cpu_seconds(parent.process.pid)
        time.sleep(1.5)
        assert _cpu_seconds(parent.process.pid) - before < 0.3


def test_engine_process_ends_on_shutdown() -> None:
    with ready() as parent:
        parent.send(add("a", 1))
        parent.step()
        parent.shut_down()
        assert parent.exit_code() == 0


def test_engine_process_never_waits_for_a_parent_that_does_not_read() -> None:
    with ready("fast") as parent:
        parent.send(add("a", 1, max_tokens=30_000))
        time.sleep(1)
        parent.shut_down()
        assert parent.exit_code() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_engine_process_leaves_signals_to_its_parent_while_serving(number: signal.Signals) -> None:
    with ready() as parent:
        os.kill(parent.process.pid, number)
        parent.send(add("a", 1, max_tokens=1))
        assert parent.step().outputs[0].tokens == [1]


def test_engine_process_fails_at_start_with_the_text_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with start("unloadable") as parent:
        assert parent.receive() == EngineFailed("there is no model at 'unloadable'; tried a folder and a file")
        assert parent.exit_code() == 1
    assert "Traceback" not in capfd.readouterr().err


def test_engine_process_logs_the_traceback_of_an_unforeseen_error(capfd: pytest.CaptureFixture[str]) -> None:
    with start("broken") as parent:
        assert parent.receive() == EngineFailed("the engine failed: ValueError: broken on purpose")
        assert parent.exit_code() == 1
    assert "Traceback" in capfd.readouterr().err


def test_engine_process_tells_why_a_step_failed() -> None:
    with ready() as parent:
        parent.send(add("a", fake_engine.POISON))
        assert parent.receive() == EngineFailed("the engine failed: RuntimeError: poisoned")
        assert parent.exit_code() == 1
        assert parent.process.exit_text() == "the engine process ended with exit code 1"


def test_engine_process_names_the_signal_that_killed_it() -> None:
    with ready() as parent:
        os.kill(parent.process.pid, signal.SIGKILL)
        assert "killed (signal 9)" in parent.process.exit_text()


def test_engine_process_folder_is_private_and_goes_with_it() -> None:
    with ready() as parent:
        folder = Path(parent.process.commands_address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


def test_engine_process_removes_folders_that_killed_parents_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stale, young, foreign = (tmp_path / name for name in ("minisgl-engine-a", "minisgl-engine-b", "else"))
    for folder in (stale, young, foreign):
        folder.mkdir()
        (folder / "commands").touch()
    os.utime(stale, (0, 0))
    first = EngineProcess(EngineConfig(), fake_engine.NAME)
    held = Path(first.commands_address.removeprefix("ipc://")).parent
    os.utime(held, (0, 0))
    second = EngineProcess(EngineConfig(), fake_engine.NAME)
    assert not stale.exists()
    assert held.exists() and young.exists() and foreign.exists()
    for process in (first, second):
        process.stop()
    assert not held.exists()


def test_engine_process_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "from minisgl.config import EngineConfig\n"
        "from minisgl.engine.process import EngineProcess\n"
        "import time\n"
        "if __name__ == '__main__':\n"
        f"    with EngineProcess(EngineConfig(model='slow'), {fake_engine.NAME!r}) as process:\n"
        "        print(process.pid, flush=True)\n"
        "        time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _alive(child):
        assert time.monotonic() < deadline, "the engine process outlived its parent"
        time.sleep(0.05)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state first."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def _cpu_seconds(pid: int) -> float:
    return sum(map(int, _stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def _alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] not in "ZX"
    except FileNotFoundError:
        return False
