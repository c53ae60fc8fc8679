"""Models whose layers run in C++, against the same models in PyTorch."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from tiny import FAMILIES, make_checkpoint

from minisgl.attention import make_attention
from minisgl.config import EngineConfig, resolve
from minisgl.engine.engine import Engine
from minisgl.hardware import CudaDevice, Hardware
from minisgl.models.decoder import CausalLM
from minisgl.models.registry import load_model
from minisgl.types import ConfigError, SamplingParams

pytestmark = pytest.mark.usefixtures("threads")
EXPECTED = json.loads((Path(__file__).parent.parent / "expected" / "smollm2.json").read_text())
PROMPT = [int(t) for t in torch.randint(2, 67, (90,), generator=torch.Generator().manual_seed(0))]


def load(path: Path, packed: bool, **options: Any) -> CausalLM:
    return load_model(path, torch.float32, torch.device("cpu"), progress=False, packed=packed, **options)


def cpu_loop(model: CausalLM, page_size: int) -> Loop:
    loop = Loop(model, page_size)
    loop.attention = make_attention("cpu")
    return loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_checkpoint(family, made[family])
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_torch(kernels: str, folder: Callable[[str], Path], family: str) -> None:
    packed, plain = load(folder(family), True), load(folder(family), False)
    assert (packed.stack is None) == (packed.config.moe is not None)
    expected = Loop(plain, 16).logits(PROMPT)
    for page_size, chunk in ((16, None), (1, 1), (16, 7), (4, 50)):
        logits = cpu_loop(packed, page_size).logits(PROMPT, chunk)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_batches_equal_torch(folder: Callable[[str], Path], family: str) -> None:
    """Mixed steps: decodes of several lengths beside prefill."""
    prompts = [PROMPT[i : 5 + 11 * i] for i in range(7)]
    packed, plain = load(folder(family), True), load(folder(family), False)
    assert cpu_loop(packed, 4).greedy(prompts, 12, chunk=20) == Loop(plain, 4).greedy(prompts, 12, chunk=20)


def test_packed_dummy_weights_are_those_of_torch(folder: Callable[[str], Path]) -> None:
    path = folder("qwen3")
    packed, plain = load(path, True, dummy=True, seed=5), load(path, False, dummy=True, seed=5)
    torch.testing.assert_close(cpu_loop(packed, 4).logits(PROMPT), Loop(plain, 4).logits(PROMPT), rtol=0, atol=1e-5)
    other = cpu_loop(load(path, True, dummy=True, seed=6), 4).logits(PROMPT)
    assert not torch.allclose(other, cpu_loop(packed, 4).logits(PROMPT), atol=1e-3)


def test_smollm2_keeps_its_blocks_and_its_greedy_tokens(smollm2: Path, kernels: str) -> None:
    engine = Engine(EngineConfig(model=str(smollm2), device="cpu", num_pages=200, max_running=8))
    assert engine.config.attention == "cpu"
    attention: Any = engine.model.layers[0].self_attn  # type: ignore[union-attr]
    assert attention.qkv_proj.weight.nbytes == 960 * 576 * 20 // 32, "Q4_1: 20 bytes for 32 weights"
    assert engine.model.embed_tokens.weight.nbytes == 49152 * 576 * 34 // 32, "Q8_0: 34"
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True).resolve({}, ())
    answers: dict[str, list[int]] = {}
    for i, case in enumerate(EXPECTED["cases"]):
        engine.add(str(i), array("i", case["prompt_token_ids"]), params)
        answers[str(i)] = []
    while engine.has_work:
        for output in engine.step():
            answers[output.id] += output.tokens
    assert list(answers.values()) == [case["output_token_ids"] for case in EXPECTED["cases"]]


def test_smollm2_packed_takes_little_memory(smollm2: Path) -> None:
    model = load(smollm2, True)
    layers = [m.weight.nbytes for m in model.modules() if hasattr(m, "weight")]
    assert sum(layers) < 1.01 * smollm2.stat().st_size


CPU = Hardware("", 2, 1 << 34, None, "none", extension=True)


def test_attention_auto_is_cpu_where_it_can_be() -> None:
    gpu = CudaDevice("", (9, 0), 132, 1, 1)
    assert resolve(EngineConfig(), CPU).attention == "cpu"
    assert resolve(EngineConfig(dtype="bfloat16"), CPU).attention == "torch_sdpa"
    assert resolve(EngineConfig(), Hardware("", 2, 1, None, "none")).attention == "torch_sdpa"
    assert resolve(EngineConfig(device="cuda"), Hardware("", 2, 1, gpu, "", extension=True)).attention != "cpu"
    with pytest.raises(ConfigError, match=r"needs device cpu, dtype float32 and the C\+\+ extension"):
        resolve(EngineConfig(attention="cpu", dtype="float16"), CPU)
