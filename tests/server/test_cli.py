"""The command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import wait_until

import minisgl
from minisgl.cli import main, serve
from minisgl.cli.options import (
    ENGINE_OPTIONS,
    SERVER_OPTIONS,
    add_engine_options,
    add_server_options,
    engine_config,
    server_config,
)
from minisgl.config import EngineConfig, ServerConfig
from minisgl.types import ConfigError

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def parse(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_engine_options(parser)
    add_server_options(parser)
    return parser.parse_args(args)


def test_options_cover_every_field_of_the_configurations() -> None:
    assert set(ENGINE_OPTIONS) == {f.name for f in dataclasses.fields(EngineConfig)}
    assert set(SERVER_OPTIONS) == {f.name for f in dataclasses.fields(ServerConfig)}


def test_options_default_to_the_configurations_own() -> None:
    assert engine_config(parse()) == EngineConfig()
    assert server_config(parse()) == ServerConfig()


def test_options_reach_their_fields() -> None:
    args = parse(
        *"--model m --device cpu --dtype float16 --dummy-weights --tp 2 --seed 3 --page-size 8".split(),
        *"--kv-cache-dtype fp8 --num-pages 9".split(),
        *"--mem-fraction 0.5 --max-model-len 10 --max-running 11 --max-batched-tokens 12 --policy lpm".split(),
        *"--no-prefix-cache --no-overlap --attention a --host h --port 13 --served-model-name n --max-queue 14".split(),
        *"--api-key k --cors * --client-timeout 15 --drain-timeout 16 --sampling-defaults neutral".split(),
    )
    engine = EngineConfig("m", "cpu", "float16", True, 2, 3, 8, "fp8", 9, 0.5, 10, 11, 12, "lpm", False, False, "a")
    assert engine_config(args) == engine
    assert server_config(args) == ServerConfig("h", 13, "n", 14, "k", "*", 15, 16, "neutral")
    assert "'k'" not in repr(server_config(args))


@pytest.mark.parametrize("args", ["--page-size 0", "--mem-fraction 2", "--tp 0", "--num-pages -1"])
def test_options_out_of_range_are_refused(args: str) -> None:
    with pytest.raises(ConfigError, match=args.split()[0][2:].replace("tp", "tp-size")):
        engine_config(parse(*args.split()))


@pytest.mark.parametrize(
    "args", ["--port 70000", "--max-queue 0", "--api-key é", "--client-timeout 0", "--drain-timeout nan"]
)
def test_server_options_out_of_range_are_refused(args: str) -> None:
    with pytest.raises(ConfigError, match=args.split()[0][2:]):
        server_config(parse(*args.split()))


def test_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_API_KEY", "secret")
    assert server_config(parse()).api_key == "secret"
    assert server_config(parse("--api-key", "other")).api_key == "other"
    with pytest.raises(ConfigError, match="api-key is empty"):  # as --api-key "$UNSET" is
        server_config(parse("--api-key", ""))


def test_serving_takes_smaller_steps_than_offline() -> None:
    assert serve.engine_config(parse()).max_batched_tokens == 2048
    assert serve.engine_config(parse("--max-running", "5000")).max_batched_tokens == 5000
    assert serve.engine_config(parse("--max-batched-tokens", "64")).max_batched_tokens == 64


def test_bare_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "serve" in capsys.readouterr().out


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out == f"minisgl {minisgl.__version__}\n"


@pytest.mark.parametrize("args", [["serve", "--bogus"], ["serve", "--mod", "m"], ["nothing"], ["--bogus", "1"]])
def test_wrong_usage_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(args)
    assert info.value.code == 2
    assert "usage: minisgl" in capsys.readouterr().err


def test_options_without_a_command_mean_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", "--port", "70000"]) == 1
    assert capsys.readouterr().err == "minisgl: error: port is 70000; expected 0 (any free one) to 65535\n"


@pytest.mark.parametrize("args", [["--help"], ["serve", "--help"], ["generate", "--help"]])
def test_help_loads_neither_torch_nor_the_server(args: list[str]) -> None:
    script = (
        "import sys; from minisgl.cli import main\n"
        f"try: main({args})\n"
        "except SystemExit: print(*(m for m in ('torch', 'numpy', 'fastapi', 'zmq') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    assert "usage: minisgl" in done.stdout


# -- generate ------------------------------------------------------------------------------------------------------


def generate(model: Path, *args: str) -> int:
    options = f"--model {model} --dummy-weights --num-pages 100 --max-tokens 12 --ignore-eos".split()
    return main(["generate", "Once upon a time", *options, *args])


def test_generate_writes_the_answer_and_one_line_of_figures(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_model, "--temperature", "0") == 0
    out, err = capsys.readouterr()
    assert out.strip()
    pattern = r"\d+ prompt tokens, 12 output tokens, first token after [\d.]+ s, then [\d.]+ tokens/s"
    assert re.fullmatch(pattern, err.strip().splitlines()[-1])


def test_generate_json_has_the_same_answer(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny_model, "--temperature", "0") == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert generate(tiny_model, "--temperature", "0", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == text
    assert (report["output_tokens"], report["finish_reason"]) == (12, "length")
    assert report["time_to_first_token"] > 0


def test_generate_renders_the_chat_template_unless_raw(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def num_prompt(*args: str) -> int:
        assert generate(tiny_model, "--json", *args) == 0
        return int(json.loads(capsys.readouterr().out)["prompt_tokens"])

    raw, chat, system = num_prompt("--raw"), num_prompt(), num_prompt("--system", "Be brief.")
    assert raw == len("Once upon a time")
    assert raw < chat < system


def test_generate_repeats_with_its_seed(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*args: str) -> str:
        assert generate(tiny_model, "--temperature", "1", *args) == 0
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")


def test_generate_tells_a_missing_model_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hi", "--model", str(tmp_path / "nothing")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("minisgl: error: ")


def test_generate_ends_quietly_on_ctrl_c_and_on_a_closed_pipe(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "minisgl", "generate", "Once", "--model", str(tiny_model)]
    command += "--dummy-weights --num-pages 300 --ignore-eos".split()
    for end, code in ((_interrupt, 130), (_close_pipe, 1)):
        process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        end(process)
        wait_until(lambda process=process: process.poll() is not None)
        assert process.returncode == code
        assert b"Traceback" not in process.stderr.read()
        process.stdout.close()
        process.stderr.close()


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)


def _close_pipe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.stdout.close()
