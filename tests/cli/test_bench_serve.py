"""`minisgl bench serve` against our own server, over an engine that gives a token every 10 ms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisgl.cli import main

STEP_MS = 10.0
LETTERS = "--token-ids 40:90"  # which the fake engine repeats, and the tokenizer has text for


@pytest.fixture(scope="module")
def url(tiny_model: Path, child_env: dict[str, str]) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("fake_server.py")), str(tiny_model), "slow"]
    process = subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.communicate(timeout=30)


def bench(url: str, options: str, file: Path | None = None) -> dict[str, object]:
    save = [] if file is None else ["--save", str(file)]
    assert main(["bench", "serve", "--url", url, *LETTERS.split(), *options.split(), *save]) == 0
    return {} if file is None else json.loads(file.read_text().splitlines()[-1])


def test_serve_measures_what_the_engine_takes(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--num-requests 20 --concurrency 4 --input-len 8:30 --output-len 12 --goodput ttft:5000 tpot:1"
    record = bench(url, options, tmp_path / "results.jsonl")
    out = capsys.readouterr().out
    assert (record["requests"], record["failed"], record["output_tokens"]) == (20, 0, 240)
    assert 8 * 20 <= record["prompt_tokens"] <= 30 * 20
    assert record["itl_ms"]["median"] < 10 * STEP_MS
    assert record["tpot_ms"]["median"] > 0.9 * STEP_MS, "the engine can't be faster"
    assert record["e2e_ms"]["median"] > 12 * 0.9 * STEP_MS
    assert record["ttft_ms"]["median"] < record["e2e_ms"]["median"]
    assert record["output_tokens_per_second"] == pytest.approx(240 / record["seconds"], rel=0.01)
    assert record["goodput"]["fraction"] == 0.0, "a token in 1 ms it is not"
    assert 1.0 <= record["tokens_per_chunk"] < 12
    assert f"{url}, fake: 20 requests 4 at a time, 0 failed" in out
    assert "goodput 0.00 requests/s (0%) within ttft 5000 ms, tpot 1 ms" in out
    assert record["settings"]["model"] == "fake" and "api_key" not in record["settings"]


def test_serve_at_a_rate_takes_as_long_as_the_arrivals(url: str, tmp_path: Path) -> None:
    record = bench(url, "--num-requests 30 --rate 30 --output-len 2", tmp_path / "results.jsonl")
    from minisgl.cli.load_prompts import arrival_times

    last = arrival_times(30, 30.0, seed=0)[-1]
    assert last < record["seconds"] < last + 20
    assert record["settings"]["rate"] == "30.0"


def test_serve_chats_with_words_behind_a_shared_prefix(url: str, tmp_path: Path) -> None:
    options = "--num-requests 6 --endpoint chat --input-len 5 --shared-prefix 40 --prefix-groups 2 --output-len 30"
    record = bench(url, options, tmp_path / "results.jsonl")
    assert (record["failed"], record["output_tokens"]) == (0, 180)
    assert record["prompt_tokens"] > 6 * 45 * 2, "words of bytes"
    assert record["settings"]["rate"] == str(math.inf)


def test_serve_counts_failures_and_goes_on(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 13 is refused; some of the prompts have it
    options = "--token-ids 13:60 --num-requests 30 --input-len 20 --output-len 2 --seed 4"
    record = bench(url, options, tmp_path / "results.jsonl")
    assert 0 < record["failed"] < 30
    [(reason, count)] = record["errors"].items()
    assert count == record["failed"] and "refused on purpose" in reason
    assert f"{count} × 400 token 13 is refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--url http://127.0.0.1:9", "doesn't list its models"),
        ("--url nonsense://x", "expected something like"),
        ("--url {url} --model other", "404"),
        ("--url {url} --input-len 200000 --num-requests 1", "can't answer a request like those"),
        ("--url {url} --rate 0", "rate is 0"),
        ("--url {url} --rate nan", "rate is nan"),
        ("--url {url} --concurrency 0", "concurrency is 0"),
        ("--url {url} --num-requests 0", "num-requests is 0"),
        ("--url {url} --goodput speed:3", "expected ttft"),
        ("--url {url} --endpoint chat --prompt ids", "no token ids"),
        ("--url {url} --save /nowhere/x", "can't write"),
        ("--url {url} --timeout 0.001", "no end within"),
    ],
)
def test_serve_tells_what_is_wrong(options: str, reason: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *LETTERS.split(), *options.format(url=url).split()]) == 1
    assert reason in capsys.readouterr().err


def test_serve_tells_when_no_request_was_answered(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    # the warm-up passes with its two tokens, the others are too slow for the limit
    options = "--num-requests 3 --input-len 4 --output-len 200 --timeout 0.7"
    assert main(["bench", "serve", "--url", url, *LETTERS.split(), *options.split()]) == 1
    assert "no request was answered: no end within 0.7 s" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--rate 1 --concurrency 2", "--input-len 0", "--extra-body 3", "--token-ids 5:1"])
def test_serve_wrong_usage_exits_with_2(options: str) -> None:
    with pytest.raises(SystemExit) as info:
        main(["bench", "serve", *options.split()])
    assert info.value.code == 2
