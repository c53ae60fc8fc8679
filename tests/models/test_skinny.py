"""Layers that call skinny_gemm give the logits of layers that don't; on the CPU with the kernel's reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from torch import Tensor

from minisgl.kernels.skinny_gemm import op
from minisgl.kernels.skinny_gemm.cases import reference
from minisgl.kernels.tuning import Config
from minisgl.models.decoder import CausalLM, DecoderLayer
from minisgl.models.registry import load_model
from minisgl.profiling.skinny import skinny_parts, switch
from minisgl.types import KernelError

Checkpoint = Callable[[str], tuple[Path, Any]]
CPU = torch.device("cpu")
NORM, SILU, ADD, HEAD = "norm", "norm silu", "add", ""


class Products:
    """Stands in for the kernel and its table: `ours` are the products that our kernel takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours: set[str] = {NORM, SILU, ADD, HEAD}
        self.calls: list[tuple[str, int]] = []  # product and rows
        self.checks = op.skinny_gemm
        monkeypatch.setattr(op, "tuned", self.tuned)
        monkeypatch.setattr(op, "skinny_gemm", self.run)

    def tuned(self, x: Tensor, weight: Tensor, norm: bool, gated: bool, add: bool) -> Config | None:
        kind = op.product_name(*weight.shape, norm, gated, add).split(" ", 2)[2:]
        return Config(128, 1) if x.shape[0] <= op.MAX_ROWS and "".join(kind) in self.ours else None

    def run(self, x: Tensor, weight: Tensor, out: Tensor, norm: Any, *options: Any, config: Config) -> None:
        eps, gated, add = options
        kind = op.product_name(*weight.shape, norm is not None, gated, add).split(" ", 2)[2:]
        self.calls.append(("".join(kind), x.shape[0]))
        with pytest.raises(KernelError, match="expected a CUDA device"):  # the last of its checks
            self.checks(x, weight, out, norm, *options, config=config)
        reference(x, weight, out, norm, eps, gated, add)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return Products(monkeypatch)


def _skinny(folder: Path) -> CausalLM:
    """The model with the switches that a CUDA build would set."""
    model = load_model(folder, torch.float32, CPU, progress=False)
    switch([*(m for m in model.layers if isinstance(m, DecoderLayer)), model.lm_head], True)
    return model


def _ids(oracle: Any, count: int) -> list[int]:
    return [(7 * i) % oracle.config.vocab_size for i in range(count)]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "mistral", "qwen3_moe", "qwen3_moe_mixed"])
def test_skinny_layers_give_the_same_logits(checkpoint: Checkpoint, products: Products, family: str) -> None:
    folder, oracle = checkpoint(family)
    expected = Loop(load_model(folder, torch.float32, CPU, progress=False)).logits(_ids(oracle, 90))
    model = _skinny(folder)
    for chunk in (1, 64, 90):
        products.calls.clear()
        logits = Loop(model).logits(_ids(oracle, 90), chunk)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert all(rows <= 64 for _, rows in products.calls)
    assert not products.calls, "more rows than the kernel takes"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("ours", [{ADD}, {NORM, SILU}, {NORM, ADD}, {SILU, HEAD}, set()], ids=str)
def test_products_change_hands_anywhere(
    checkpoint: Checkpoint, products: Products, family: str, ours: set[str]
) -> None:
    """Whatever the table gives to our kernel and whatever to cuBLAS, nothing is added twice or not at all."""
    folder, oracle = checkpoint(family)
    expected = Loop(load_model(folder, torch.float32, CPU, progress=False)).logits(_ids(oracle, 20))
    model = _skinny(folder)
    products.ours = ours
    torch.testing.assert_close(Loop(model).logits(_ids(oracle, 20), 5), expected, rtol=1e-4, atol=1e-4)
    assert {kind for kind, _ in products.calls} <= ours


def test_decode_step_of_a_layer_is_four_products(checkpoint: Checkpoint, products: Products) -> None:
    folder, oracle = checkpoint("qwen3")
    model = _skinny(folder)
    Loop(model).logits(_ids(oracle, 1))
    assert products.calls == [(NORM, 1), (ADD, 1), (SILU, 1), (ADD, 1)] * len(model.layers) + [(HEAD, 1)]


def test_layers_with_experts_have_two_products(checkpoint: Checkpoint, products: Products) -> None:
    """Each layer's QKV takes the norm, since the experts before it were added to the stream."""
    folder, oracle = checkpoint("qwen3_moe")
    model = _skinny(folder)
    Loop(model).logits(_ids(oracle, 1))
    assert products.calls == [(NORM, 1), (ADD, 1)] * len(model.layers) + [(HEAD, 1)]


@pytest.mark.parametrize(("family", "ours"), [("qwen2", {ADD, SILU, HEAD}), ("llama_bias", {HEAD})])
def test_products_with_biases_are_left_alone(
    checkpoint: Checkpoint, products: Products, family: str, ours: set[str]
) -> None:
    folder, oracle = checkpoint(family)
    expected = Loop(load_model(folder, torch.float32, CPU, progress=False)).logits(_ids(oracle, 20))
    torch.testing.assert_close(Loop(_skinny(folder)).logits(_ids(oracle, 20), 5), expected, rtol=1e-4, atol=1e-4)
    assert {kind for kind, _ in products.calls} == ours


def test_layers_with_experts_take_the_stream_over(checkpoint: Checkpoint, products: Products) -> None:
    """The first layer is dense, those behind it have experts."""
    folder, oracle = checkpoint("qwen3_moe_mixed")
    expected = Loop(load_model(folder, torch.float32, CPU, progress=False)).logits(_ids(oracle, 40))
    model = load_model(folder, torch.float32, CPU, progress=False)
    first = model.layers[0]
    assert isinstance(first, DecoderLayer)
    switch([first], True)
    torch.testing.assert_close(Loop(model).logits(_ids(oracle, 40)), expected, rtol=1e-4, atol=1e-4)
    assert products.calls == [(NORM, 40), (ADD, 40), (SILU, 40), (ADD, 40)]


def test_models_on_a_cpu_have_no_skinny_parts(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("qwen3")
    assert not skinny_parts(load_model(folder, torch.float32, CPU, progress=False))


def test_tables_know_products_by_shape_and_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"skinny_gemm 64x32 norm": {1: (128, 1), 16: (256, 2)}}
    monkeypatch.setattr("minisgl.kernels.tuning._table", lambda _: table)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = lambda rows, name: op.choose_product.__wrapped__(name, 0, rows)  # noqa: E731
    name = op.product_name(64, 32, norm=True, gated=False, add=False)
    assert found(1, name) == Config(128, 1)
    assert found(9, name) == found(16, name) == Config(256, 2)
    assert found(2, name) is found(17, name) is None, "buckets that nobody measured are cuBLAS's"
    assert found(1, op.product_name(64, 32, norm=False, gated=False, add=True)) is None


def test_float32_and_large_batches_are_left_alone() -> None:
    weight = torch.zeros(64, 32)
    assert op.tuned(torch.zeros(1, 32), weight) is None
    assert op.tuned(torch.zeros(65, 32, dtype=torch.bfloat16), weight.bfloat16()) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_behind_a_norm_are_left_alone_where_they_would_overflow(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times its gain the row is beyond float16, normed it isn't."""
    monkeypatch.setattr(op, "choose_product", lambda *_: Config(128, 1))
    x, gain, weight = torch.zeros(1, 32, dtype=dtype), torch.full((32,), 8.0, dtype=dtype), torch.ones(64, 32).to(dtype)
    x[0, 0] = 16384
    fits = bool((x * gain).isfinite().all())
    assert torch.nn.functional.rms_norm(x, (32,), gain).isfinite().all() and fits == (dtype == torch.bfloat16)
    assert (op.tuned(x, weight, norm=True) is not None) == fits
    assert op.tuned(x, weight) is not None


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize("shape", ["smollm2", "qwen3-30b-a3b"])
def test_skinny_layers_on_a_gpu_stay_close(shape: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher-forced in bfloat16, all products ours or none, beside the same model in float32."""
    from minisgl.config import EngineConfig
    from minisgl.engine.engine import Engine
    from minisgl.profiling.shapes import SHAPES, shape_folder

    small = {"num_hidden_layers": 3, "num_experts": 8, "vocab_size": 1000}  # all experts chosen: rounding can't choose
    monkeypatch.setitem(SHAPES, "qwen3-30b-a3b", SHAPES["qwen3-30b-a3b"] | small)
    calls = []
    real = op.skinny_gemm

    def logits(dtype: str, ours: bool) -> Tensor:
        monkeypatch.setattr(op, "tuned", lambda x, *_: Config(256, 2) if ours and x.shape[0] <= op.MAX_ROWS else None)
        monkeypatch.setattr(op, "skinny_gemm", lambda *args, **kw: (calls.append(1), real(*args, **kw)))
        with shape_folder(shape) as folder:
            config = EngineConfig(str(folder), dummy_weights=True, dtype=dtype, num_pages=300, cuda_graph=False)
            engine = Engine(config)
        layers = engine.model.config.num_layers
        assert len(skinny_parts(engine.model)) == layers + 1
        loop = Loop(engine.model)
        sequences = [loop.add([3 + i, 5, 7 + i]) for i in range(batch)]
        steps = [loop.step([(s, 1) for s in sequences]).float() for _ in range(3)]
        return torch.cat(steps)

    exact, plain = logits("float32", False), logits("bfloat16", False)
    assert not calls
    ours = logits("bfloat16", True)
    assert len(calls) >= 3 * 4
    error, usual = ((x - exact).norm() / exact.norm() for x in (ours, plain))
    assert error < max(2e-2, 1.2 * usual), f"{error:.2e}, without skinny_gemm {usual:.2e}"
