"""Batch jobs that are stopped: every line is answered once, whatever happens."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_files import SHORT, Files, prompts
from servers import wait_until

from minisgl import LLM


def test_second_run_answers_what_is_left(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*prompts(6))
    assert files.run() == 0
    whole = files.target.read_bytes().splitlines(keepends=True)
    files.target.write_bytes(b"".join(whole[:2]))
    assert files.run() == 0
    assert sorted(files.answers()) == [1, 2, 3, 4, 5, 6]
    assert files.target.read_bytes().startswith(b"".join(whole[:2]))
    assert "6 lines answered, 2 of them by earlier runs" in capsys.readouterr().err


def test_finished_job_is_left_alone(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.put(*prompts(2))
    assert files.run() == 0
    before = files.target.read_bytes()
    monkeypatch.delattr("minisgl.llm.LLM")  # nothing is loaded for it
    assert files.run() == 0
    assert files.target.read_bytes() == before


@pytest.mark.parametrize("tail", [b"{", b'{"line": 3, "digest": "ab', b'{"line": 3}\n', b"\0" * 100, b'{"line"\0\0\0'])
def test_torn_last_record_is_cut_off(files: Files, tail: bytes) -> None:
    files.put(*prompts(4))
    assert files.run() == 0
    whole = files.target.read_bytes().splitlines(keepends=True)
    files.target.write_bytes(b"".join(whole[:2]) + tail)
    assert files.run() == 0
    assert sorted(files.answers()) == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"notes", b"notes\n", b'{"line": 1}\n{"line": 2}\n', b'{"text": "x"}\n', b"1,2\n"])
def test_file_of_something_else_is_left_alone(files: Files, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*prompts(1))
    files.target.write_bytes(content)
    assert files.run() == 1
    assert "holds something else" in capsys.readouterr().err
    assert files.target.read_bytes() == content


def test_changed_input_is_refused(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*prompts(3))
    assert files.run() == 0
    files.put(*prompts(2), {"prompt": "changed"})
    assert files.run() == 1
    assert "line 3 of the input has changed" in capsys.readouterr().err
    files.put(*prompts(2))
    assert files.run() == 1
    assert "line 3 of the input is gone" in capsys.readouterr().err
    files.put(*prompts(5))  # more lines are welcome
    assert files.run() == 0
    assert len(files.answers()) == 5


@pytest.mark.parametrize("options", [["--seed", "7"], ["--max-tokens", "3"], ["--system", "x"]])
def test_other_options_are_refused(files: Files, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*prompts(1))
    assert files.run() == 0
    assert files.run(*options) == 1
    assert "other options" in capsys.readouterr().err


def test_two_runs_at_once_are_refused(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*prompts(1))
    with files.target.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert files.run() == 1
    assert "being written by another run" in capsys.readouterr().err


def test_full_disk_is_told_and_mended(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files.put(*prompts(5))
    write = os.write
    with monkeypatch.context() as patch:

        def full(descriptor: int, data: Any) -> int:
            if len(files.target.read_bytes()) > 400:
                raise OSError(28, "No space left on device")
            return write(descriptor, data[:70])  # and no write is whole

        patch.setattr("minisgl.cli.batch_output.os.write", full)
        assert files.run() == 1
    assert "No space left on device" in capsys.readouterr().err
    assert files.run() == 0
    assert len(files.answers()) == 5


def test_ctrl_c_keeps_what_was_answered(
    files: Files, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files.put(*prompts(60))
    step = tiny_llm.engine.step
    with monkeypatch.context() as patch:

        def interrupted() -> Any:
            if files.target.read_bytes().count(b"\n") >= 10:
                os.kill(os.getpid(), signal.SIGINT)
            return step()

        patch.setattr(tiny_llm.engine, "step", interrupted)
        assert files.run() == 130
    assert "lines are left, the same command goes on" in capsys.readouterr().err
    assert 10 <= len(files.answers()) < 60
    assert files.run() == 0
    assert len(files.answers()) == 60


def test_kill_9_loses_no_answer_and_doubles_none(files: Files, tiny_model: Path, child_env: dict[str, str]) -> None:
    lines = [{"prompt": f"Prompt {i}", "custom_id": f"id {i}", **SHORT, "max_tokens": 40} for i in range(700)]
    files.put(*lines)
    command = [sys.executable, "-m", "minisgl", "generate", "--model", str(tiny_model), "--dummy-weights"]
    command += ["--num-pages", "200", "--input", str(files.source), "--output", str(files.target)]

    def num_lines() -> int:
        return files.target.read_bytes().count(b"\n") if files.target.exists() else 0

    kept = b""
    for at_least in (1, 120):
        process = subprocess.Popen(command, env=child_env, stderr=subprocess.PIPE)
        wait_until(lambda at_least=at_least: num_lines() >= at_least)
        process.kill()
        process.communicate()
        assert num_lines() < len(lines), "the job ended before it was killed"
        content = files.target.read_bytes()
        assert content.startswith(kept), "what a run wrote, the next one leaves alone"
        kept = content[: content.rindex(b"\n") + 1]
    done = subprocess.run(command, env=child_env, capture_output=True, text=True, check=True, timeout=120)
    assert files.target.read_bytes().startswith(kept)
    assert "700 lines answered" in done.stderr.replace("\n", " ")
    answers = files.answers()
    assert sorted(answers) == list(range(1, 701))
    assert all(record["custom_id"] == f"id {number - 1}" for number, record in answers.items())
