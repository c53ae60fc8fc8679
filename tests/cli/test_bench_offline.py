"""The offline benchmark: its workload, the floor it prints, and what it reports."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import tiny

from minisgl import LLM
from minisgl.cli import main
from minisgl.cli.bench_offline import draw
from minisgl.cli.bench_options import Range, length_range
from minisgl.models.registry import read_config
from minisgl.profiling import floor
from minisgl.profiling.floor import Cost, Speed, body_parameters, workload_cost
from minisgl.profiling.shapes import SHAPES, shape_folder

# Parameters of the published checkpoints.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2": 134_515_008,
    "qwen3-4b": 4_022_468_096,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
}


def test_workload_is_offline256() -> None:
    work = draw(256, Range(100, 1024), Range(100, 1024), seed=0, vocab_size=151_936)
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    assert work.prompts == prompts
    assert work.outputs == [random.randint(100, 1024) for _ in range(256)]
    assert (work.num_input, work.num_output) == (142_827, 133_966)


def test_workload_stays_within_a_small_vocabulary() -> None:
    work = draw(20, Range(50, 50), Range(3, 5), seed=1, vocab_size=100)
    assert max(map(max, work.prompts)) == 99
    assert {len(p) for p in work.prompts} == {50} and set(work.outputs) == {3, 4, 5}


@pytest.mark.parametrize(("text", "expected"), [("7", Range(7, 7)), ("100:1024", Range(100, 1024))])
def test_range_of_lengths(text: str, expected: Range) -> None:
    assert length_range(text) == expected


@pytest.mark.parametrize("text", ["0", "5:3", "a", "1:2:3", ":", "-1", "1:"])
def test_range_that_makes_no_sense_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if text == "1:":
        assert length_range(text) == Range(1, 1)
        return
    with pytest.raises(SystemExit) as info:
        main(["bench", "offline", "--input-len", text])
    assert info.value.code == 2


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_as_many_parameters_as_the_model(name: str) -> None:
    with shape_folder(name) as folder:
        config = read_config(folder)
    assert not folder.exists()
    vectors = 2 * config.hidden_size + (2 * config.head_dim if name.startswith("qwen3") else 0)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    layers = body_parameters(config)
    if config.moe is not None:
        idle = config.moe.num_experts - config.moe.num_experts_per_token
        layers += config.num_layers * idle * 3 * config.hidden_size * config.moe.intermediate_size
    assert layers + config.num_layers * vectors + config.hidden_size + tables == PUBLISHED[name]


# -- the floor -----------------------------------------------------------------------------------------------------


def build(folder: Path, family: str, **options: object) -> LLM:
    tiny.FAMILIES[family]().save_pretrained(folder)
    return LLM(str(folder), device="cpu", dummy_weights=True, num_pages=64, dtype="bfloat16", **options)


@pytest.mark.parametrize("family", ["llama_tied", "llama_bias", "qwen2", "qwen3", "mistral"])
def test_cost_counts_what_the_steps_of_a_lone_request_touch(family: str, tmp_path: Path) -> None:
    """3 prompt tokens and 4 output tokens: a prefill step, then 3 steps that see 4, 5 and 6 tokens."""
    engine = build(tmp_path, family).engine
    model = engine.model
    shape = model.config
    cost = workload_cost(engine, [3], [4])
    every = sum(p.nbytes for p in model.parameters())
    read = every if shape.tie_embeddings else every - model.embed_tokens.weight.nbytes
    kv = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    assert cost.bytes == 4 * read + kv * (4 + 5 + 6)
    named = [(n, p) for n, p in model.named_parameters() if "embed" not in n and "head" not in n]
    matrices = sum(p.numel() for _, p in named if p.ndim > 1)
    head = shape.vocab_size * shape.hidden_size
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * (1 + 2 + 3 + 4 + 5 + 6)
    assert cost.flops == 2 * matrices * 6 + 2 * head * 4 + attention


def test_cost_of_a_crowd_shares_the_weights_of_a_step(tmp_path: Path) -> None:
    engine = build(tmp_path, "llama_tied", max_running=2).engine
    alone, together = workload_cost(engine, [3], [4]), workload_cost(engine, [3, 3, 3], [4, 4, 4])
    weights = sum(p.nbytes for p in engine.model.parameters())
    kv = alone.bytes - 4 * weights
    assert together.bytes == 6 * weights + 3 * kv, "12 tokens, two at a time, make six steps at least"
    assert together.flops == 3 * alone.flops


def test_cost_sees_no_further_than_the_window(tmp_path: Path) -> None:
    engine = build(tmp_path, "mistral").engine  # a window of 11
    shape = engine.model.config
    kv = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    difference = workload_cost(engine, [9], [6]).bytes - workload_cost(engine, [1], [6]).bytes
    assert difference == kv * ((10 + 11 + 11 + 11 + 11) - (2 + 3 + 4 + 5 + 6))


def test_cost_counts_the_experts_that_a_step_touches(tmp_path: Path) -> None:
    engine = build(tmp_path, "qwen3_moe").engine  # 5 experts, 2 a token
    shape = engine.model.config
    assert shape.moe is not None
    experts = shape.num_layers * 5 * 3 * shape.hidden_size * shape.moe.intermediate_size * 2
    one, crowd = workload_cost(engine, [1], [1]), workload_cost(engine, [1] * 30, [1] * 30)
    assert crowd.bytes - one.bytes == pytest.approx(experts * 3 / 5, rel=1e-6), "2 of 5 against nearly all"


def test_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    speed = Speed(bytes=100.0, flops=1000.0)
    assert Cost(200, 500).seconds(speed) == 2
    assert Cost(200, 5000).seconds(speed) == 5


def test_measured_speed_is_plausible() -> None:
    speed = floor.measure("cpu", "float32")
    assert 1e8 < speed.bytes < 1e13 and 1e8 < speed.flops < 1e15


# -- the command ---------------------------------------------------------------------------------------------------


def test_offline_prints_the_floor_first_and_saves_a_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISGL_COMMIT", "abc")
    file = tmp_path / "results.jsonl"
    options = f"--model {tiny_model} --dummy-weights --num-prompts 40 --input-len 20:60 --output-len 5:30 --save {file}"
    assert main(["bench", "offline", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("40 prompts, ") and "256 requests and 16384 tokens a step, seed 0" in lines[1]
    assert re.match(r"floor +[\d,]+ tok/s +[\d.]+ s  memory [\d.]+ s at", lines[2])
    assert re.match(r"engine +[\d,]+ tok/s +[\d.]+ s  \d+% of the floor", lines[3])
    record = json.loads(file.read_text())
    expected = draw(40, Range(20, 60), Range(5, 30), 0, 259)
    assert record["output_tokens"] == expected.num_output and record["input_tokens"] == expected.num_input
    assert record["tokens_per_second"] == pytest.approx(record["output_tokens"] / record["seconds"], rel=1e-2)
    assert record["tokens_per_second"] < record["floor_tokens_per_second"]
    assert (record["bench"], record["commit"], record["settings"]["max_model_len"]) == ("offline", "abc", 4096)
    assert record["prefix_cache"] in ("minisgl._C", "minisgl.cache.reference")


def test_offline_runs_a_shape_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    monkeypatch.setitem(SHAPES, "qwen3-0.6b", SHAPES["qwen3-0.6b"] | small)
    options = "--shape qwen3-0.6b --num-prompts 3 --input-len 8 --output-len 4 --num-pages 20 --seed 3"
    assert main(["bench", "offline", *options.split()]) == 0
    out = capsys.readouterr().out
    assert out.startswith("qwen3-0.6b (") and "random weights" in out
    assert "3 prompts, 24 tokens in, 12 out" in out and "seed 3" in out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--num-prompts 0", "num-prompts is 0"),
        ("--num-prompts 2 --max-model-len 64", "the longest request has"),
        ("--num-prompts 2 --input-len 8 --output-len 2 --save {missing}/x", "can't write"),
    ],
)
def test_offline_tells_what_is_wrong(
    options: str, reason: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = options.format(missing=tmp_path / "missing").split()
    assert main(["bench", "offline", "--model", str(tiny_model), "--dummy-weights", *args]) == 1
    assert reason in capsys.readouterr().err
