"""`minisgl profile request`, through a real server, with a tiny model and the default one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from servers import make_model

from minisgl.cli import main
from minisgl.cli.lab.server import engine_arguments, serving
from minisgl.config import EngineConfig
from minisgl.profiling.record import read
from minisgl.types import MinisglError

OPERATORS = {"qkv", "rope+store", "attention", "o", "gate/up", "silu*mul", "down"}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


def measure(out: Path, *options: str) -> dict[str, Any]:
    """The record, after what holds for every one was checked."""
    assert main(["profile", "request", "--quick", "--device", "cpu", "--out", str(out), *options]) == 0
    record = read(out / "request.json")
    rows, summary = record.rows, record.summary
    assert record.quick and record.kind == "request"
    for window, measured in (("ttft", summary["ttft_ms"]), ("itl", summary["itl_ms"])):
        per = 1 if window == "ttft" else summary["output_tokens"] - 1
        in_rows = sum(row["us"] for row in rows if row["window"] == window) / 1e3 / per
        assert in_rows == pytest.approx(measured, rel=0.05)
        assert sum(summary["operators"][window].values()) == pytest.approx(measured, rel=0.05)
    categories = {"network", "server", "schedule", "prefill", "decode", "kernel", "gap"}
    assert {row["category"] for row in rows} <= categories and 0 < summary["accounted"] <= 1
    assert all(b["start_us"] == pytest.approx(a["start_us"] + a["us"], abs=0.01) for a, b in pairwise(rows))
    check_trace(out / summary["trace"])
    return {"rows": rows, "summary": summary}


def check_trace(path: Path) -> None:
    """Spans of three processes, nested on each thread."""
    events = json.loads(path.read_text())["traceEvents"]
    processes = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert {"client", "server", "engine"} <= processes
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in events:
        if e["ph"] == "X":
            assert e["name"] and e["dur"] >= 0
            threads.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for spans in threads.values():
        around: list[float] = []
        for start, end in sorted(spans, key=lambda s: (s[0], -s[1])):
            while around and around[-1] <= start + 0.002:
                around.pop()
            assert not around or end <= around[-1] + 0.002
            around.append(end)


def test_request_of_a_tiny_model(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = measure(out, "--model", str(tiny_model), "--dummy-weights", "--num-pages", "200", "--prompt", "ABCD" * 20,
                    "--max-tokens", "24")  # fmt: skip
    assert found["summary"]["prompt_tokens"] >= 80 and found["summary"]["output_tokens"] == 24
    names = {row["span"] for row in found["rows"]}
    # not the ways between processes: one may begin before the other has ended
    wanted = {"connect", "tokenize", "schedule", "radix match", "prepare", "sample", "detokenize", "decode step"}
    assert wanted | OPERATORS | {"embedding", "rmsnorm", "lm head"} <= names
    shown = capsys.readouterr().out
    assert "time to first token: " in shown and "time a token, mean of 23: " in shown and "█" in shown
    assert {path.name for path in out.iterdir()} == {"request.json", "request.trace.json"}


def test_request_of_the_default_model(smollm2: Path, tmp_path: Path) -> None:
    found = measure(tmp_path, "--prompt", "The capital of France is", "--no-overlap")
    by_layer: dict[int, set[str]] = {}
    for row in found["rows"]:
        if row["category"] == "prefill" and row["layer"] is not None:
            by_layer.setdefault(row["layer"], set()).add(row["span"])
    assert set(by_layer) == set(range(30)) and all(OPERATORS <= names for names in by_layer.values())
    assert found["summary"]["accounted"] > 0.3  # 0.98 on a quiet machine


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(MinisglError, match="no-such-folder"), serving("--model", str(tmp_path / "no-such-folder")):
        pass


def test_arguments_make_the_configuration_again() -> None:
    config = EngineConfig(model="m", overlap=False, num_pages=7, mem_fraction=0.5, dummy_weights=True)
    words = engine_arguments(config)
    assert sorted(words) == sorted(
        ["--model", "m", "--no-overlap", "--num-pages", "7", "--mem-fraction", "0.5", "--dummy-weights"]
    )


@pytest.mark.parametrize("options", [["--max-tokens", "1"], ["--warm-up", "0"]])
def test_request_refuses_what_has_no_timeline(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "request", *options]) == 1
    assert "--max-tokens of at least 2" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("options", [[], ["--no-cuda-graph"]], ids=["graphs", "eager"])
def test_request_on_a_gpu_lists_its_kernels(tiny_model: Path, tmp_path: Path, options: list[str]) -> None:
    arguments = ["--model", str(tiny_model), "--dummy-weights", "--num-pages", "200", *options]
    assert main(["profile", "request", "--quick", "--device", "cuda", "--out", str(tmp_path), *arguments]) == 0
    record = read(tmp_path / "request.json")
    kernels = [row for row in record.rows if row["category"] == "kernel" and row["window"] == "ttft"]
    assert OPERATORS <= {row["span"] for row in kernels}
    assert sum(r["us"] for r in record.rows if r["window"] == "ttft") / 1e3 == pytest.approx(
        record.summary["ttft_ms"],
        abs=1e-3,  # rounded
    )
