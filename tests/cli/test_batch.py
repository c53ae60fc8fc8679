"""`minisgl generate` with several prompts, and from file to file: every line answered once, whatever happens."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import wait_until

from minisgl import LLM
from minisgl.cli import batch as batch_module
from minisgl.cli import main

Record = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_model(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process share one engine."""
    monkeypatch.setattr("minisgl.llm.LLM", lambda **_: tiny_llm)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "requests.jsonl", tmp_path / "answers.jsonl")


class Files:
    """Input and output of a job."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target

    def put(self, *lines: Any) -> None:
        self.source.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def run(self, *options: str, model: str = "tiny") -> int:
        arguments = ["--input", str(self.source), "--output", str(self.target), "--model", model, *options]
        return main(["generate", *arguments])

    def answers(self) -> dict[int, Record]:
        """Records by line; a line must not have two."""
        records = [json.loads(line) for line in self.target.read_bytes().splitlines()]
        by_line = {record["line"]: record for record in records}
        assert len(by_line) == len(records), "a line was answered twice"
        return by_line


SHORT = {"max_tokens": 5, "ignore_eos": True, "temperature": 0}


def openai_line(custom_id: str, **body: Any) -> Record:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**SHORT, **body}}


def test_every_form_of_line_is_answered_as_the_engine_would(files: Files, tiny_llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    files.put(
        {"prompt": "Once upon", **SHORT},
        {"prompt": [1, 2, 3], "custom_id": "ids", **SHORT},
        "",
        {"messages": messages, **SHORT, "max_tokens": 7},
        openai_line("chat", messages=messages, max_completion_tokens=9),
        openai_line("text", prompt="Once upon", n=2, seed=1, temperature=1),
    )
    assert files.run() == 0
    answers = files.answers()
    assert sorted(answers) == [1, 2, 4, 5, 6]
    batch_params = [batch_module.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (5, 7, 9)]
    assert answers[1]["text"] == tiny_llm.generate("Once upon", batch_params[0])[0].text
    assert answers[1]["finish_reason"] == "length"
    assert answers[1]["usage"]["prompt_tokens"] == len("Once upon")
    assert (answers[2]["custom_id"], answers[2]["usage"]["completion_tokens"]) == ("ids", 5)
    assert answers[4]["text"] == tiny_llm.chat(messages, batch_params[1])[0].text
    chat = answers[5]["response"]
    assert (answers[5]["custom_id"], answers[5]["error"], chat["status_code"]) == ("chat", None, 200)
    [choice] = chat["body"]["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": tiny_llm.chat(messages, batch_params[2])[0].text,
    }
    assert chat["body"]["usage"]["completion_tokens"] == 9
    body = answers[6]["response"]["body"]
    assert body["object"] == "text_completion" and [c["index"] for c in body["choices"]] == [0, 1]


def test_n_answers_and_logprobs_come_as_choices(files: Files) -> None:
    files.put(
        {"prompt": "x", **SHORT, "n": 2}, {"messages": [{"role": "user", "content": "x"}], **SHORT, "logprobs": True}
    )
    assert files.run() == 0
    answers = files.answers()
    assert len(answers[1]["choices"]) == 2 and answers[1]["choices"][0]["text"] == answers[1]["text"]
    [choice] = answers[2]["choices"]
    assert len(choice["logprobs"]["content"]) == 5
    assert choice["logprobs"]["content"][0]["logprob"] < 0


BAD = {
    "not json": ("{nope", "not valid JSON"),
    "no object": ("[1]", "expected a JSON object"),
    "nothing asked": ({"max_tokens": 3}, "either prompt or messages"),
    "both": ({"prompt": "x", "messages": []}, "either prompt or messages"),
    "wrong type": ({"prompt": "x", "temperature": "hot"}, "temperature: "),
    "out of range": ({"prompt": "x", "temperature": -1}, "temperature is -1"),
    "empty prompt": ({"prompt": ""}, "prompt is empty"),
    "unknown token": ({"prompt": [5000]}, "outside the vocabulary"),
    "too long": ({"prompt": "x" * 5000}, "5000 tokens"),
    "several prompts": ({"prompt": ["a", "b"]}, "one prompt"),
    "unsupported": ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
    "refused by the template": ({"messages": [{"role": "tool", "content": "x"}]}, "no tools, please"),
    "another model": ({"prompt": "x", "model": "gpt-9"}, "gpt-9"),
    "body of no kind": ({"custom_id": "b", "body": 3}, "body"),
    "unknown url": ({"custom_id": "u", "url": "/v1/embeddings", "body": {"prompt": "x"}}, "/v1/embeddings"),
    "surrogate": ('{"prompt": "\\ud800", "custom_id": "\\ud801"}', ""),
    "deep": ("[" * 100_000, "not valid JSON"),
}


def test_bad_lines_become_error_records_and_stop_nothing(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*(line for line, _ in BAD.values()), {"prompt": "fine", **SHORT})
    assert files.run() == 0
    answers = files.answers()
    assert len(answers) == len(BAD) + 1
    for number, (name, (_, reason)) in enumerate(BAD.items(), 1):
        record = answers[number]
        if "response" in record:
            assert record["response"]["status_code"] == 400
            record = record["response"]["body"]
        assert reason in record["error"]["message"], name
    assert answers[len(BAD) + 1]["usage"]["completion_tokens"] == 5
    assert f"{len(BAD) + 1} lines answered, {len(BAD)} with an error; 5 tokens" in capsys.readouterr().err


def test_custom_id_given_twice_is_an_error(files: Files) -> None:
    files.put(*({"prompt": "x", "custom_id": name, **SHORT} for name in "aba"))
    assert files.run() == 0
    assert "is that of line 1" in files.answers()[3]["error"]["message"]
    assert "error" not in files.answers()[1]


def test_options_fill_in_what_lines_leave_open(files: Files) -> None:
    files.put({"prompt": "x"}, {"prompt": "x", "max_tokens": 2}, {"messages": [{"role": "user", "content": "x"}]})
    assert files.run("--max-tokens", "4", "--ignore-eos", "--system", "Be brief.") == 0
    answers = files.answers()
    assert [answers[i]["usage"]["completion_tokens"] for i in (1, 2, 3)] == [4, 2, 4]
    assert answers[3]["usage"]["prompt_tokens"] > len("Be brief.")


# -- resuming ------------------------------------------------------------------------------------------------------


def prompts(count: int) -> list[Record]:
    return [{"prompt": f"Prompt {i}", **SHORT} for i in range(count)]


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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--input {source}", "--input and --output go together"),
        ("prompt --output x", "--input and --output go together"),
        ("", "expected prompts"),
        ("prompt --input {source} --output x", "expected prompts"),
        ("--input {source} --output x --json", "--raw and --json"),
        ("--input {missing} --output {target}", "can't read"),
        ("--input {folder} --output {target}", "can't read"),
        ("--input {source} --output {folder}/none/x", "can't be written"),
        ("--input {source} --output {source}", "both"),
    ],
)
def test_wrong_usage_is_told(files: Files, options: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    files.put(*prompts(1))
    before = files.source.read_bytes()
    folder = files.source.parent
    names = {"source": files.source, "target": files.target, "folder": folder, "missing": folder / "missing"}
    assert main(["generate", *(part.format(**names) for part in options.split())]) == 1
    assert reason in capsys.readouterr().err
    assert files.source.read_bytes() == before and not files.target.exists()


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


def test_job_keeps_hundreds_in_flight(files: Files, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    files.put(*prompts(400))
    step, waiting = tiny_llm.engine.step, []

    def counting() -> Any:
        waiting.append(len(tiny_llm.engine.scheduler.requests))
        return step()

    monkeypatch.setattr(tiny_llm.engine, "step", counting)
    assert files.run() == 0
    assert waiting[0] == 256 and max(waiting) == 256


def test_kill_9_loses_no_answer_and_doubles_none(files: Files, tiny_model: Path, child_env: dict[str, str]) -> None:
    lines = [{"prompt": f"Prompt {i}", "custom_id": f"id {i}", **SHORT, "max_tokens": 40} for i in range(300)]
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
    assert "300 lines answered" in done.stderr.replace("\n", " ")
    answers = files.answers()
    assert sorted(answers) == list(range(1, 301))
    assert all(record["custom_id"] == f"id {number - 1}" for number, record in answers.items())


# -- prompts as arguments ------------------------------------------------------------------------------------------


def test_several_prompts_are_answered_in_order(tiny_llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--max-tokens 6 --ignore-eos --temperature 0".split()
    texts = ["One", "Two", "Three"]
    alone = []
    for text in texts:
        assert main(["generate", text, "--json", *options]) == 0
        alone.append(json.loads(capsys.readouterr().out)["text"])
    assert main(["generate", *texts, *options]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n" for text in alone)
    assert [line for line in err.splitlines() if line.startswith("> ")] == ["> One", "> Two", "> Three"]
    assert main(["generate", *texts, "--json", *options]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == alone


def test_several_prompts_share_the_engines_steps(tiny_llm: LLM) -> None:
    before = tiny_llm.engine.stats().steps
    assert main(["generate", *"abcd", "--max-tokens", "20", "--ignore-eos"]) == 0
    assert tiny_llm.engine.stats().steps - before < 30
