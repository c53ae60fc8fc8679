"""The FP8 cache: what it holds, what it is scaled by, and that every way through the engine still works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import GREEDY, Driver
from loop import Loop
from tiny import make_checkpoint

from minisgl.cache.pool import FP8, FP8_MAX, KVPool
from minisgl.config import EngineConfig, resolve
from minisgl.engine.memory import choose_num_pages
from minisgl.hardware import CudaDevice, detect
from minisgl.models.kv_scales import TYPICAL, kv_scales
from minisgl.models.registry import load_model
from minisgl.types import ConfigError

CPU = torch.device("cpu")
PROMPT = torch.randint(2, 67, (75,), generator=torch.Generator().manual_seed(0)).tolist()
PARAMS = replace(GREEDY, max_tokens=12)
FAMILIES = ("llama_bias", "mistral", "qwen3", "qwen3_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_checkpoint(family, made[family])
        return made[family]

    return get


def fp8_pool(like: KVPool, num_pages: int) -> KVPool:
    return KVPool(like.num_layers, like.num_kv_heads, like.head_dim, like.page_size, num_pages, FP8, CPU)


def test_pool_divides_by_the_head_s_scale_and_clamps() -> None:
    pool = KVPool(2, 3, 8, 4, 5, FP8, CPU)
    scale = torch.tensor([[1.0, 1, 1], [0.25, 1, 8]])
    pool.set_scales(scale, scale.flip(1))
    k, v = torch.randn(2, 6, 3, 8) * 3
    k[0, 0, 0], v[1, 2, 3] = 1e6, -1e6
    slots = torch.tensor([3, 0, 19, 7, 8, 10])
    pool.store(1, k, v, slots)
    for half, x, scales in zip(pool.slots(1), (k, v), (scale[1], scale[1].flip(0)), strict=True):
        held, wanted = half[slots].float(), x / scales[:, None]
        assert held.abs().max() == FP8_MAX
        torch.testing.assert_close(held, wanted.clamp(-FP8_MAX, FP8_MAX), rtol=2**-4, atol=2**-10)
    assert not pool.k[0].float().any()
    assert pool.k.element_size() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_bring_keys_and_values_into_the_middle_of_the_range(folder: Callable[[str], Path], family: str) -> None:
    model = load_model(folder(family), torch.float32, CPU, progress=False)
    loop = Loop(model)
    k_scale, v_scale = kv_scales(model)
    assert k_scale.shape == v_scale.shape == (model.config.num_layers, model.num_kv_heads_per_rank)
    assert torch.equal(torch.stack((k_scale, v_scale)).log2() % 1, torch.zeros(2, *k_scale.shape))
    loop.pool = fp8_pool(loop.pool, 512)
    loop.pool.set_scales(k_scale, v_scale)
    loop.logits(PROMPT)
    for half in (loop.pool.k, loop.pool.v):
        held = half.float()[half.float().abs().sum((-1, -2)) > 0]  # [tokens of all layers, heads, dim]
        assert TYPICAL / 4 < held.square().mean().sqrt() < TYPICAL * 4
        assert held.abs().max() < FP8_MAX


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_over_an_fp8_cache_stay_close(folder: Callable[[str], Path], family: str) -> None:
    model = load_model(folder(family), torch.float32, CPU, progress=False)
    exact, loop = Loop(model).logits(PROMPT), Loop(model)
    loop.pool = fp8_pool(loop.pool, 512)
    loop.pool.set_scales(*kv_scales(model))
    whole = loop.logits(PROMPT)
    error = (whole - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.25, "0: the cache isn't quantised at all"


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_with_fp8_cache_answers_alike_on_every_route(folder: Callable[[str], Path], family: str) -> None:
    options = {"attention": "torch_sdpa", "kv_cache_dtype": "fp8", "dtype": "float32"}
    driver = Driver(folder(family), **options, max_batched_tokens=512)
    assert driver.engine.runner.pool.k.dtype == FP8
    first, second = driver.ask(PROMPT, PARAMS), driver.ask(PROMPT, PARAMS)
    assert (first.num_cached, second.num_cached) == (0, 64)
    assert first.tokens == second.tokens and len(first.tokens) == 12
    chunked = Driver(folder(family), **options, max_batched_tokens=7, max_running=1, overlap=False)
    assert chunked.ask(PROMPT, PARAMS).tokens == first.tokens
    tight = Driver(folder(family), **options, max_batched_tokens=512, num_pages=11)
    other = tight.add(PROMPT[::-1], replace(PARAMS, max_tokens=70))
    ours = tight.add(PROMPT, PARAMS)
    request = tight.engine.scheduler.requests[ours]
    tight.run()
    assert request.num_preemptions > 0
    assert tight.answers[ours].tokens == first.tokens
    assert len(tight.answers[other].tokens) == 70


def test_an_fp8_page_takes_a_quarter_of_a_float32_page() -> None:
    sizes = [KVPool(30, 3, 64, 16, 1, dtype, "cpu").page_bytes for dtype in (torch.float32, FP8)]
    assert sizes[0] == 4 * sizes[1]


def test_memory_has_room_for_more_fp8_pages(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama_bias"), torch.float32, CPU, progress=False).config
    config = EngineConfig(device="cpu", max_running=10_000, max_batched_tokens=10_000)
    with mock.patch("minisgl.engine.memory.available_memory", return_value=1 << 32):
        pools = [KVPool(model.num_layers, 2, model.head_dim, 16, 1, d, CPU) for d in (torch.float32, FP8)]
        few, many = (choose_num_pages(config, model, torch.float32, p.page_bytes, 1 << 20) for p in pools)
    assert 3.9 * few < many < 4.1 * few


def test_attention_that_can_t_read_fp8_is_avoided_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    here = replace(detect(), extension=True, cuda=None)
    config = EngineConfig(device="cpu", kv_cache_dtype="fp8")
    assert resolve(config, here).attention == "torch_sdpa"
    assert "not cpu" in caplog.text
    with pytest.raises(ConfigError, match="attention cpu can't serve kv-cache-dtype fp8.*torch_sdpa"):
        resolve(replace(config, attention="cpu"), here)
    with pytest.raises(ConfigError, match="kv-cache-dtype is 'int4'; expected auto or fp8"):
        EngineConfig(kv_cache_dtype="int4")


@pytest.mark.parametrize(
    ("capability", "attention"), [((8, 0), "torch_sdpa"), ((8, 9), "torch_sdpa"), ((9, 0), "triton")]
)
def test_triton_reads_fp8_where_the_gpu_does(capability: tuple[int, int], attention: str) -> None:
    gpu = mock.create_autospec(CudaDevice, instance=True, capability=capability)
    machine = replace(detect(), cuda=gpu)
    config = EngineConfig(device="cuda", kv_cache_dtype="fp8", fused_kernels="off")
    with mock.patch("minisgl.config.triton_runs", return_value=True):
        assert resolve(config, machine).attention == attention
    if attention != "triton":
        with pytest.raises(ConfigError, match=r"triton.*9\.0"):
            resolve(replace(config, attention="triton"), machine)
