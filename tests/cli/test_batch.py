"""`minisgl generate` with several prompts, and from file to file: what goes in and what comes out."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from batch_files import SHORT, Files, Record, prompts

from minisgl import LLM, SamplingParams
from minisgl.cli import main

pytestmark = pytest.mark.usefixtures("one_engine")


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
    batch_params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (5, 7, 9)]
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


def test_job_keeps_hundreds_in_flight(files: Files, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    files.put(*prompts(400))
    step, waiting = tiny_llm.engine.step, []

    def counting() -> Any:
        waiting.append(len(tiny_llm.engine.scheduler.requests))
        return step()

    monkeypatch.setattr(tiny_llm.engine, "step", counting)
    assert files.run() == 0
    assert waiting[0] == 256 and max(waiting) == 256


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
    assert "first token after" not in err, "the later ones were there before they were printed"
    assert re.search(r"3 answers, 18 output tokens in \d+\.\d\d s, \d+\.\d tokens/s in all", err)
    assert main(["generate", *texts, "--json", *options]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == alone


def test_several_prompts_share_the_engines_steps(tiny_llm: LLM) -> None:
    before = tiny_llm.engine.stats().steps
    assert main(["generate", *"abcd", "--max-tokens", "20", "--ignore-eos"]) == 0
    assert tiny_llm.engine.stats().steps - before < 30
