"""`minisgl profile step`: costs of operators, kernels of graphs named by the step without one, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from servers import make_model
from torch.nn import functional as F

from minisgl.cli import main
from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.kernels.skinny_gemm import op as skinny_op
from minisgl.models import decoder
from minisgl.models.layers import MLP
from minisgl.profiling.decode_costs import OperatorCost, decode_costs
from minisgl.profiling.floor import kv_bytes, weight_bytes
from minisgl.profiling.record import read
from minisgl.profiling.shapes import shape_folder
from minisgl.profiling.spans import Span
from minisgl.profiling.step import StepProfile, engine_for, measure, name_graph_kernels, operator, profile_of, rows
from minisgl.types import ConfigError

US = 1000
EAGER = ("step", "decode 2", "forward", "layer 0")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


def make_engine(model: Path, batch: int, context: int, **options: object) -> Engine:
    config = EngineConfig(model=str(model), device="cpu", dtype="float32", dummy_weights=True, **options)  # type: ignore[arg-type]
    return Engine(engine_for(config, batch, context, steps=2))


# -- what operators cost -------------------------------------------------------------------------------------------


def test_costs_hold_every_weight_and_every_token_seen_once() -> None:
    with shape_folder("smollm2") as folder:
        engine = make_engine(folder, 1, 16, attention="torch_sdpa")
    near, far = decode_costs(engine, 3, 100), decode_costs(engine, 3, 300)
    assert far["attention"].bytes - near["attention"].bytes == 3 * 200 * kv_bytes(engine)
    assert far["attention"].flops - near["attention"].flops == 4 * 3 * 200 * 9 * 64 * 30
    one, two = decode_costs(engine, 1, 100), decode_costs(engine, 2, 100)
    products = ("qkv", "o", "gate/up", "down", "lm head")
    weights = sum(2 * one[name].bytes - two[name].bytes for name in products)  # activations double, weights don't
    norms = 61 * 576 * 4
    assert weights == weight_bytes(engine) - norms
    assert sum(two[name].flops for name in products) == 2 * 2 * (weights // 4)
    assert (one["qkv"].calls, one["rmsnorm"].calls, one["lm head"].calls) == (30, 61, 1)


def test_costs_stop_at_the_window(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, 1, 16, attention="torch_sdpa")
    engine.model.layers[0].self_attn.window = 50  # type: ignore[union-attr]
    assert decode_costs(engine, 1, 50)["attention"] == decode_costs(engine, 1, 500)["attention"]


@pytest.mark.parametrize("left_to_cublas", ["", "qkv", "o", "gate/up", "down"])
def test_costs_of_fused_products_hold_what_they_absorb(monkeypatch: pytest.MonkeyPatch, left_to_cublas: str) -> None:
    """One layer in words: every product ours, or all but one."""
    with shape_folder("smollm2") as folder:
        engine = make_engine(folder, 1, 16, attention="torch_sdpa")
    apart = decode_costs(engine, 4, 100)
    layer = engine.model.layers[0]
    weights = {"qkv": layer.self_attn.qkv_proj, "o": layer.self_attn.o_proj}  # type: ignore[union-attr]
    weights |= {"gate/up": layer.mlp.gate_up_proj, "down": layer.mlp.down_proj}  # type: ignore[union-attr]
    shapes = {module.weight.shape: name for name, module in weights.items()}

    def tuned(x: torch.Tensor, weight: torch.Tensor, norm: bool, gated: bool, add: bool) -> object:
        assert x.shape == (4, weight.shape[1])
        name = shapes[weight.shape]
        assert (norm, gated, add) == (name in ("qkv", "gate/up"), name == "gate/up", name in ("o", "down"))
        return None if name == left_to_cublas else object()

    monkeypatch.setattr(skinny_op, "tuned", tuned)
    for each in engine.model.layers:
        each.skinny = True  # type: ignore[assignment]
    fused = decode_costs(engine, 4, 100)
    layers, hidden, inner, item = 30, 576, 1536, 4
    x = 4 * hidden * item
    norms = {"": 0, "qkv": layers, "o": layers, "gate/up": layers, "down": layers - 1}[left_to_cublas]  # in layers
    read_twice = {"o": layers, "down": layers}.get(left_to_cublas, 0)  # with a residual to be added
    assert fused["rmsnorm"].calls == norms + 1
    assert fused["rmsnorm"].bytes == (norms + 1) * 2 * x + read_twice * 2 * x
    grown = {name: fused[name].bytes - apart[name].bytes for name in weights}
    gains = {"qkv": 0, "down": 1}.get(left_to_cublas, layers)  # the first layer's is taken whatever is behind
    assert grown["qkv"] == gains * hidden * item
    assert grown["o"] == (left_to_cublas != "o") * layers * x
    assert grown["down"] == (left_to_cublas != "down") * layers * x
    if left_to_cublas in ("o", "gate/up"):  # a norm, or its own, goes before it
        assert grown["gate/up"] == 0 and fused["silu*mul"] == apart["silu*mul"]
    else:
        assert grown["gate/up"] == layers * (hidden - 4 * inner) * item and "silu*mul" not in fused
    assert [fused[name].flops for name in weights] == [apart[name].flops for name in weights]


def test_products_past_their_modules_have_spans(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers call `skinny_product` with weights; here torch does what it says, on a CPU."""
    engine = make_engine(tiny_model, 2, 16, attention="torch_sdpa")
    engine.model.stack = None

    def product(x, weight, norm=None, gated=False, add_to=None):  # type: ignore[no-untyped-def]
        y = F.linear(x if norm is None else norm(x)[0], weight)
        y = MLP.activate(engine.model.layers[0].mlp, y) if gated else y  # type: ignore[arg-type]
        return y if add_to is None else add_to.add_(y)

    monkeypatch.setattr(decoder, "skinny_product", product)
    for layer in engine.model.layers:
        layer.skinny = True  # type: ignore[assignment]
    found = measure(engine, 2, 16, 2)
    calls = {u.operator: u.calls for u in found.used}
    layers = len(engine.model.layers)
    assert {name: calls[name] for name in ("qkv", "o", "gate/up", "down")} == dict.fromkeys(
        ("qkv", "o", "gate/up", "down"), layers
    )
    assert decoder.skinny_product is product, "the spans stayed"


# -- kernels -------------------------------------------------------------------------------------------------------


def kernel(name: str, start: float, us: float, *path: str) -> Span:
    return Span(name, round(start * US), round((start + us) * US), "gpu", "stream 7", path)


REFERENCE = [
    kernel("index_select", 0, 1, "step", "decode 2", "prepare"),
    kernel("gemm", 10, 2, *EAGER, "qkv"),
    kernel("paged", 20, 2, *EAGER, "attention"),
    kernel("gemm", 30, 2, *EAGER, "o"),
    kernel("argmax", 40, 2, "step", "decode 2", "sample"),
    kernel("Memcpy DtoH (Device -> Pinned)", 50, 1, "step", "decode 2", "sample"),
]
GRAPH = ("step", "decode 2", "forward")


def graph_step(start: float) -> list[Span]:
    """Its tokens leave by a kernel, not by a copy."""
    names = ("gather", "gemm", "paged", "gemm", "argmax", "mail")
    return [kernel(name, start + 2 * i, 1.5, *GRAPH) for i, name in enumerate(names)]


def test_graph_kernels_get_the_operators_of_the_plain_step() -> None:
    host = Span("step", 0, 30 * US, "engine", "main")
    named = name_graph_kernels([host, *graph_step(0), *graph_step(15)], REFERENCE)
    assert host in named
    operators = [(operator(s), s.name.split()[0]) for s in named if s.process == "gpu"]
    step = [("step inputs", "gather"), ("qkv", "gemm"), ("attention", "paged"), ("o", "gemm"), ("sample", "argmax")]
    assert operators == [*step, ("step inputs", "mail")] * 2


def test_reference_is_the_whole_step_where_one_was_cut() -> None:
    cut = [s for s in REFERENCE if s.start >= 20 * US]
    later = [Span(s.name, s.start + 90 * US, s.end + 90 * US, s.process, s.thread, s.path) for s in REFERENCE]
    named = name_graph_kernels(graph_step(0), [*cut, *later])
    assert [operator(s) for s in named][1] == "qkv"


def test_gaps_of_a_step_are_when_the_gpu_does_nothing() -> None:
    spans = [Span("step", 0, 15 * US, "engine", "main"), Span("step", 15 * US, 30 * US, "engine", "main")]
    late = kernel("of the next step", 31, 5)
    spans = name_graph_kernels([*spans, *graph_step(0), *graph_step(15), late], REFERENCE)
    found = profile_of(spans, 14.0, 100, {}, "a route")
    assert (found.step_us, found.plain_us, found.gaps_us) == (15, 14, 6)
    assert {(u.operator, u.kernel): (u.calls, u.us) for u in found.used}["qkv", "gemm"] == (1, 1.5)
    assert sum(u.us for u in found.used) + found.gaps_us == found.step_us


def test_kernels_that_overlap_share_no_time() -> None:
    """With dependent launch a kernel begins early and waits; its own time starts where all before it have ended."""
    spans = [
        Span("step", 0, 40 * US, "engine", "main"),
        kernel("product", 0, 10, *EAGER, "qkv"),
        kernel("post", 1, 11, *EAGER, "rope+store"),  # to 12: works for 2
        kernel("decode", 2, 18, *EAGER, "attention"),  # to 20: works for 8
        kernel("combine", 3, 18, *EAGER, "attention"),  # to 21: works for 1
        kernel("copy", 15, 2, *EAGER, "attention"),  # of another stream, all in the decode's time
        kernel("product", 25, 20, *EAGER, "o"),  # beyond the last step's end
    ]
    found = profile_of(spans, 40.0, 5, {}, "")
    used = [(u.operator, u.kernel, u.us) for u in found.used]
    assert used == [
        ("qkv", "product", 10), ("rope+store", "post", 2), ("attention", "decode", 8), ("attention", "combine", 1),
        ("attention", "copy", 0), ("o", "product", 15),
    ]  # fmt: skip
    assert found.gaps_us == 4 and sum(u.us for u in found.used) + found.gaps_us == found.step_us == 40


def test_rows_hold_an_operators_floor_against_all_its_kernels() -> None:
    spans = [
        Span("step", 0, 100 * US, "engine", "main"),
        kernel("decode", 0, 30, *EAGER, "attention"),
        kernel("combine", 30, 10, *EAGER, "attention"),
        kernel("tiny", 50, 4, *EAGER, "rmsnorm"),
        kernel("other", 60, 1, *EAGER),
    ]
    costs = {"attention": OperatorCost(2, 40_000_000, 0), "rmsnorm": OperatorCost(1, 100, 0)}
    found = rows(profile_of(spans, 90.0, 5, costs, ""), {"hbm_gbps": 2000, "launch_us": 2.0}, True, "bf16_tflops")
    assert [(r["operator"], r["kernel"], r["us"]) for r in found] == [
        ("attention", "decode", 30), ("attention", "combine", 10), ("rmsnorm", "tiny", 4), ("layer", "other", 1),
    ]  # fmt: skip
    assert (found[0]["floor_us"], found[0]["limit"], found[0]["fraction"]) == (20, "HBM", 0.5)
    assert (found[2]["floor_us"], found[2]["limit"], found[2]["fraction"]) == (2, "launch", 0.5)
    assert found[1]["floor_us"] is found[3]["floor_us"] is None


# -- the measurement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_step_adds_up_on_a_cpu(tiny_model: Path, overlap: bool) -> None:
    engine = make_engine(tiny_model, 3, 40, overlap=overlap)
    found: StepProfile = measure(engine, 3, 40, 2)
    assert sum(u.us for u in found.used) + found.gaps_us == pytest.approx(found.step_us, rel=1e-6)
    calls = {u.operator: u.calls for u in found.used}
    assert {name: calls[name] for name in found.costs} == {name: cost.calls for name, cost in found.costs.items()}
    assert 40 < found.context < 70 and found.plain_us > 0


def test_step_that_does_not_fit_says_so(tiny_model: Path) -> None:
    engine = make_engine(tiny_model, 2, 40)
    with pytest.raises(ConfigError, match="9 requests of 40 tokens"):
        measure(engine, 9, 40, 2)
    with pytest.raises(ConfigError, match="5000 tokens"):
        measure(engine, 2, 5000, 2)


def test_command_writes_the_step(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--steps", "2"]
    assert main(["profile", "step", "--model", str(tiny_model), "--dummy-weights", *options]) == 0
    record = read(tmp_path / "step.json")
    assert record.kind == "step" and record.quick and record.ceilings["cpu_gbps"] > 0
    keys = {"operator", "kernel", "calls", "us", "bytes", "floor_us", "limit", "fraction"}
    assert all(set(row) == keys for row in record.rows)
    summary = record.summary
    assert (summary["batch"], summary["context"], summary["steps"]) == (2, 64, 2)
    total = sum(row["us"] for row in record.rows) + summary["gaps_us"]
    assert total == pytest.approx(summary["step_us"], rel=0.01)
    for row in record.rows:
        if row["floor_us"] is not None:
            assert row["fraction"] == pytest.approx(row["floor_us"] / row["us"], rel=0.05, abs=1e-3)
    shown = capsys.readouterr().out
    assert "gate/up" in shown and "without the profiler the step takes" in shown


def test_command_refuses_sizes_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "step", "--batch", "0"]) == 1
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [[], ["--no-cuda-graph"]], ids=["graphs", "eager"])
def test_step_on_a_gpu_names_its_kernels(tmp_path: Path, graphs: list[str]) -> None:
    options = ["--quick", "--device", "cuda", "--out", str(tmp_path), "--shape", "qwen3-0.6b", *graphs]
    assert main(["profile", "step", *options]) == 0
    record = read(tmp_path / "step.json")
    total = sum(row["us"] for row in record.rows) + record.summary["gaps_us"]
    assert total == pytest.approx(record.summary["step_us"], rel=0.05)
    calls = {row["operator"]: row["calls"] for row in record.rows if row["floor_us"] is not None}
    assert {"qkv", "attention", "o", "gate/up", "down", "lm head", "sample"} <= set(calls)
    assert calls["qkv"] == pytest.approx(28, rel=0.1)
