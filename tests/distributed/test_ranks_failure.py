"""Ranks that die, fail or differ take the group down at once, say why, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_world import LIMIT_S, assert_gone, children, folder, greedy, prompt, rank_pids, script, start
from servers import alive, wait_until

from minisgl import LLM
from minisgl.config import EngineConfig
from minisgl.engine.lead import divide_threads
from minisgl.engine.ranks import Ranks
from minisgl.types import ConfigError, EngineDeadError, ModelError

SOON_S = 30.0  # "seconds", on a machine that has much else to do
SOAK_S = 600.0


def work(llm: LLM) -> None:
    """Generates until something is raised."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        llm.generate([prompt(20, i) for i in range(4)], greedy(40))


@contextmanager
def taken_down(llm: LLM, match: str) -> Iterator[None]:
    """What happens inside ends the group with an error that matches."""
    pids, path = rank_pids(llm), folder(llm)
    began = time.monotonic()
    with pytest.raises(EngineDeadError, match=match):
        yield
    assert time.monotonic() - began < SOON_S
    assert_gone(pids, path)
    with pytest.raises(EngineDeadError, match=match):
        llm.generate([1, 2, 3], greedy(1))


# -- while it serves -----------------------------------------------------------------------------------------------


def test_rank_killed_while_idle(tp_model: Path) -> None:
    llm = start(tp_model, 2)
    llm.generate([1, 2, 3], greedy(4))
    with taken_down(llm, r"rank 1 was killed \(signal 9\)"):
        os.kill(rank_pids(llm)[0], signal.SIGKILL)
        work(llm)


def test_rank_killed_in_a_collective_is_named_though_others_notice_first(tp_model: Path) -> None:
    llm = start(tp_model, 4)
    llm.generate([1, 2, 3], greedy(4))
    with taken_down(llm, r"rank 2 was killed \(signal 9\)"):
        timer = threading.Timer(0.3, os.kill, (rank_pids(llm)[1], signal.SIGKILL))
        timer.start()
        work(llm)
    timer.join()


def test_rank_that_fails_shows_its_own_traceback(tp_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = start(tp_model, 2)
    with caplog.at_level(logging.ERROR), taken_down(llm, "rank 1: DecodeError"):
        llm.engine._ranks._links[0].send_bytes(b"\xc1")  # type: ignore[attr-defined]
        work(llm)
    assert "Traceback" in caplog.text
    assert "in follow" in caplog.text


def test_rank_that_differs_says_in_what(tp_model: Path) -> None:
    llm = start(tp_model, 2)
    llm.generate(prompt(30, 3), greedy(4))
    with taken_down(llm, r"rank 1 differs from rank 0 before step \d+: free pages$"):
        llm.engine.scheduler.ledger.free.reverse()
        work(llm)


def test_rank_0_that_fails_ends_the_others(tp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start(tp_model, 2)
    pids, path = rank_pids(llm), folder(llm)
    monkeypatch.setattr(llm.engine.runner, "launch", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate([1, 2, 3], greedy(4))
    assert_gone(pids, path)


# -- at the start --------------------------------------------------------------------------------------------------


def test_option_that_no_rank_can_serve_is_one_error(tp_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ModelError, EngineDeadError), match="max-model-len is 9999"):
        start(tp_model, 2, max_model_len=9999)
    assert_gone(children(os.getpid()))
    assert "Traceback" not in capfd.readouterr().err


def test_rank_that_can_not_start_says_why(tp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ranks._start

    def other_config(self: Ranks, config: EngineConfig, rank: int) -> None:
        original(self, replace(config, max_model_len=9999), rank)

    monkeypatch.setattr(Ranks, "_start", other_config)
    with pytest.raises(EngineDeadError, match="rank 1: max-model-len is 9999"):
        start(tp_model, 2)
    assert_gone(children(os.getpid()))


def test_size_that_can_not_work_is_refused_before_ranks_start(
    smollm2: Path, tp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "__init__", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(ConfigError, match=r"9 attention heads don't divide by 2.*--tp can be: 1, 3$"):
        start(smollm2, 2)
    with pytest.raises(ConfigError, match=r"8 attention heads don't divide by 3.*--tp can be: 1, 2, 4, 8"):
        start(tp_model, 3)


def test_check_variable_takes_0_and_1_only(tp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CHECK_RANKS", "yes")
    with pytest.raises(ConfigError, match=r"MINISGL_CHECK_RANKS is 'yes'; expected 1"):
        start(tp_model, 2)


def test_watch_variable_takes_seconds_only(tp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_WATCH_RANKS", "yes")
    with pytest.raises(EngineDeadError, match=r"rank 1: MINISGL_WATCH_RANKS is 'yes'; expected a number"):
        start(tp_model, 2)


# -- rank 0's process ends -----------------------------------------------------------------------------------------

WORK = """\
with LLM(**options) as llm:
    print("ready")
    while True:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=40, ignore_eos=True))
"""


@contextmanager
def at_work(model: Path, tmp: Path) -> Iterator[tuple[Any, list[int]]]:
    """A script that uses two ranks without end, and the pids of its ranks."""
    process = script(WORK, model, tmp)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
        pids = children(process.pid)
        assert len(pids) == 1
        yield process, pids
    finally:
        process.kill()
        process.communicate()


def test_ranks_die_with_a_killed_parent(tp_model: Path, tmp_path: Path) -> None:
    with at_work(tp_model, tmp_path) as (process, pids):
        process.kill()
        process.wait()
        assert_gone(pids)
    wait_until(lambda: not list((tmp_path / "tmp").iterdir()), LIMIT_S)


def test_ctrl_c_ends_all_ranks_cleanly(tp_model: Path, tmp_path: Path) -> None:
    with at_work(tp_model, tmp_path) as (process, pids):
        errors = ""
        while process.returncode is None:
            for pid in (*filter(alive, pids), process.pid):  # as a terminal does
                os.kill(pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):  # an interrupt that came in a destructor is lost
                _, errors = process.communicate(timeout=20)
        assert process.returncode in (1, -signal.SIGINT)
        assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
        assert_gone(pids)
    assert not list((tmp_path / "tmp").iterdir())


def test_script_that_ends_without_closing_ends_its_ranks(tp_model: Path, tmp_path: Path) -> None:
    """It has no `if __name__ == "__main__"` either, and starts once; and weakref's exit handler was there first."""
    body = "print('once')\nllm = LLM(**options)\nprint(len(llm.generate([[1, 2, 3]])[0].token_ids) > 0)\n"
    process = script(body, tp_model, tmp_path)
    output, errors = process.communicate(timeout=2 * LIMIT_S)
    assert (process.returncode, output) == (0, "once\nTrue\n"), errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "tmp").iterdir())


HANG = """\
import logging, os, time
from minisgl.engine import ranks

ranks.HANG_S = 1.0
logging.basicConfig()
llm = LLM(**options)
llm.engine._ranks._on_gpu = True
llm.engine.runner.launch = lambda _: (os.kill(llm.engine._ranks._processes[0].pid, 9), time.sleep(1000))
llm.generate([[1, 2, 3]])
"""


def test_process_ends_where_a_gpu_would_wait_for_the_dead(tp_model: Path, tmp_path: Path) -> None:
    process = script(HANG, tp_model, tmp_path)
    _, errors = process.communicate(timeout=2 * LIMIT_S)
    assert process.returncode == 1
    assert "rank 1 was killed (signal 9); the system does that when memory runs out; the GPU waits for it" in errors
    assert not list((tmp_path / "tmp").iterdir())


# -- at rest -------------------------------------------------------------------------------------------------------


def test_ranks_rest_without_work_and_end_with_close(tp_model: Path) -> None:
    def cpu_seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    llm = start(tp_model, 2)
    llm.generate([1, 2, 3], greedy(4))
    [pid] = rank_pids(llm)
    path = folder(llm)
    time.sleep(0.2)
    before = cpu_seconds(pid)
    time.sleep(1.5)
    assert cpu_seconds(pid) - before < 0.3
    for _ in range(2):
        llm.close()
        assert not alive(pid)
        assert not path.exists()


def test_threads_are_divided_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", counts.append)
    monkeypatch.setattr("minisgl.engine.lead.cpu.available", lambda: False)
    monkeypatch.setattr("minisgl.engine.lead.detect", lambda: replace(_hardware(), num_cores=8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for size in (2, 3, 16):
        divide_threads(EngineConfig(device="cpu", tp_size=size))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    divide_threads(EngineConfig(device="cpu", tp_size=2))
    assert counts == [4, 2, 1]


def _hardware() -> Any:
    from minisgl.hardware import detect

    return detect()


# -- killed at any moment ------------------------------------------------------------------------------------------


def kill_one(model: Path, size: int, chance: random.Random) -> None:
    """Starts a group and kills one of its ranks at a random moment of its start or its work."""
    victim, delay = chance.randrange(1, size), chance.uniform(0, 6)
    before = set(children(os.getpid()))
    killed: list[float] = []

    def kill() -> None:
        wait_until(lambda: len(set(children(os.getpid())) - before) == size - 1, LIMIT_S)
        pids = sorted(set(children(os.getpid())) - before)
        time.sleep(delay)
        killed.append(time.monotonic())
        os.kill(pids[victim - 1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(EngineDeadError, match=r"rank \d was killed \(signal 9\)"):
        work(start(model, size))
    ended = time.monotonic()
    killer.join()
    assert ended - killed[0] < SOON_S, (victim, delay)
    assert set(children(os.getpid())) <= before


@pytest.mark.parametrize("seed", range(3))
def test_rank_killed_at_a_random_moment(tp_model: Path, seed: int) -> None:
    kill_one(tp_model, (2, 4, 2)[seed], random.Random(seed))


@pytest.mark.slow
@pytest.mark.timeout(2 * SOAK_S)
def test_ranks_killed_for_ten_minutes(tp_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared, chance = set(os.listdir("/dev/shm")), random.Random(time.time_ns())
    deadline, count = time.monotonic() + SOAK_S, 0
    while time.monotonic() < deadline:
        kill_one(tp_model, chance.choice((2, 4)), chance)
        assert not list(tmp_path.glob("minisgl-*"))
        count += 1
    assert set(os.listdir("/dev/shm")) <= shared
    print(f"{count} kills")
