"""The layers that call the project's CUDA kernels, with the kernels' references in their place: any device runs them.

Each call goes to the real public function first, whose checks refuse everything the kernel couldn't take; the last
of them refuses the CPU, and then the reference does the work.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from tiny import FAMILIES

from minisgl.cache.pool import FP8, KVPool
from minisgl.distributed import TPGroup
from minisgl.kernels.spec import registry
from minisgl.models.build import Build, heads_fit
from minisgl.models.decoder import CausalLM
from minisgl.models.layers import VocabTable
from minisgl.models.registry import load_model, read_config
from minisgl.types import KernelError

Checkpoint = Callable[[str], tuple[Path, Any]]
CALLED = ("index", "rmsnorm", "add_rmsnorm", "qkv_post", "silu_mul")
MODULES = {"add_rmsnorm": "rmsnorm"}
CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel was called; with the fixture, `Build` makes fused layers on a CPU."""
    counts = dict.fromkeys(CALLED, 0)

    def stand_in(name: str) -> Callable[..., None]:
        spec = registry()[name]

        def call(*args: Any) -> None:
            with pytest.raises(KernelError, match="expected a CUDA device"):
                spec.run(*args)
            counts[name] += 1
            spec.reference(*args)

        return call

    for name in CALLED:
        module = importlib.import_module(f"minisgl.kernels.{MODULES.get(name, name)}.op")
        monkeypatch.setattr(module, name, stand_in(name))
    monkeypatch.setattr(Build, "fused", property(lambda self: self.fused_kernels))
    monkeypatch.setattr("minisgl.kernels.skinny_gemm.op.tuned", lambda *_: None)  # see test_skinny.py
    return counts


def _load(folder: Path, dtype: torch.dtype = torch.float32, fused: bool = False) -> CausalLM:
    return load_model(folder, dtype, CPU, progress=False, fused=fused)


def _prompt(vocab: int, length: int) -> list[int]:
    return torch.randint(2, vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "chunks-of-7"])
def test_fused_layers_give_the_same_logits(
    checkpoint: Checkpoint, calls: dict[str, int], family: str, chunk: int | None
) -> None:
    folder, oracle = checkpoint(family)
    ids = _prompt(oracle.config.vocab_size, 60)
    plain, fused = (Loop(_load(folder, fused=f)).logits(ids, chunk) for f in (False, True))
    assert float((plain - fused).norm() / plain.norm()) < 2e-6
    steps = -(-len(ids) // (chunk or len(ids)))
    layers = read_config(folder).num_layers
    experts = sum(type(layer.mlp).__name__ == "MixtureOfExperts" for layer in _load(folder).layers)
    norms = {"rmsnorm": 1 + experts, "add_rmsnorm": 2 * layers - experts}  # experts add theirs
    expected = {"index": 1, **norms, "qkv_post": layers, "silu_mul": layers - experts}
    assert calls == {name: steps * count for name, count in expected.items()}


@pytest.mark.parametrize("family", ["llama_bias", "mistral", "qwen3", "qwen3_moe_mixed"])
def test_fused_layers_give_the_same_tokens_in_mixed_batches(
    checkpoint: Checkpoint, calls: dict[str, int], family: str
) -> None:
    folder, oracle = checkpoint(family)
    prompts = [_prompt(oracle.config.vocab_size, n) for n in (1, 5, 33, 50)]
    plain, fused = (Loop(_load(folder, fused=f)).greedy(prompts, 16, chunk=13) for f in (False, True))
    assert plain == fused and calls["qkv_post"]


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_fused_layers_in_half_precision_stay_close(checkpoint: Checkpoint, calls: dict[str, int], family: str) -> None:
    folder, oracle = checkpoint(family)
    ids = _prompt(oracle.config.vocab_size, 40)
    exact = Loop(_load(folder)).logits(ids)
    fused = Loop(_load(folder, torch.bfloat16, fused=True)).logits(ids)
    assert fused.dtype == torch.bfloat16 and calls["qkv_post"]
    assert float((fused - exact).norm() / exact.norm()) < 0.08


def test_fused_layers_fill_an_fp8_cache(checkpoint: Checkpoint, calls: dict[str, int]) -> None:
    folder, oracle = checkpoint("qwen3")
    ids = _prompt(oracle.config.vocab_size, 40)
    logits = []
    for fused in (False, True):
        loop = Loop(_load(folder, fused=fused))
        shape = loop.model.config
        loop.pool = KVPool(shape.num_layers, loop.model.num_kv_heads_per_rank, shape.head_dim, 4, 512, FP8, CPU)
        loop.pool.set_scales(torch.full((2, 1), 0.5), torch.full((2, 1), 0.25))
        logits.append(loop.logits(ids, 7))
    plain, fused_logits = logits
    assert calls["qkv_post"] and float((plain - fused_logits).norm() / plain.norm()) < 0.02


@dataclass(frozen=True)
class Alone(TPGroup):
    """A rank whose sum with the others is left to the test."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_fused_embedding_of_two_ranks_adds_up(checkpoint: Checkpoint, calls: dict[str, int]) -> None:
    config = read_config(checkpoint("llama")[0])
    assert config.vocab_size % 2, "so that the last range is padded"
    table = torch.randn(config.vocab_size, config.hidden_size)
    ids = torch.tensor([0, 50, 51, config.vocab_size - 1, 7], dtype=torch.int32)
    total = torch.zeros(len(ids), config.hidden_size)
    for rank in range(2):
        part = VocabTable(Build(config, torch.float32, CPU, Alone(rank, 2), fused_kernels=True))
        for _, place in part.places("embed_tokens"):
            place.put(table[place.slices()])
        total += part.embed(ids)
    assert torch.equal(total, table[ids.long()]) and calls["index"] == 2


def test_heads_that_do_not_fit_leave_the_layers_to_torch() -> None:
    assert [dim for dim in (4, 8, 20, 24, 96, 128, 256, 264, 512) if heads_fit(dim)] == [8, 24, 96, 128, 256]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_kernels_compile_for_every_family(checkpoint: Checkpoint, family: str) -> None:
    """The tiny models' heads are smaller than any in the kernels' own tests."""
    pytest.importorskip("cuda.core", reason="the GPU extra isn't installed")
    from minisgl.kernels import nvrtc
    from minisgl.kernels.qkv_post import op

    config = read_config(checkpoint(family)[0])
    shape = {"heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "norm": 1}
    log = io.StringIO()
    code = nvrtc.compile_cubin(op.build_for(torch.float32, shape, 1), "sm_90", log)
    assert code.startswith(b"\x7fELF") and "0 bytes spill stores" in log.getvalue()
