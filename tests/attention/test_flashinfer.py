"""The FlashInfer backend: what it hands to the package, on a CPU and with a stand-in for it; on a GPU, its results."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from harness import GREEDY, Driver
from test_graphs import Uncaptured
from test_triton_paged import INTERPRETED, MIXES, TOLERANCE, Geometry, error, make_batch, make_queries, reference
from test_triton_paged import random_lens as any_lens
from tiny import greedy, make_checkpoint
from torch import Tensor

from minisgl.attention import AttentionBackend, ForwardBatch, make_attention
from minisgl.attention.triton_pages import PageList, list_pages
from minisgl.cache.pool import KVPool
from minisgl.config import EngineConfig, resolve
from minisgl.engine.graphs import batch_sizes
from minisgl.hardware import detect
from minisgl.types import ConfigError

MODULE = "minisgl.attention.flashinfer"
DECODE = "BatchDecodeWithPagedKVCacheWrapper"
PREFILL = "BatchPrefillWithPagedKVCacheWrapper"


class Wrapper:
    """As the package's: runs what was planned, over the lists that the device holds by then, which must agree."""

    def reset_workspace_buffer(self, floats: Tensor, ints: Tensor) -> None:
        assert floats.dtype == ints.dtype == torch.uint8

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        starts, ids, last = self.lists
        assert torch.equal(starts, self.planned[0]) and torch.equal(last, self.planned[1])
        assert self.queries[-1] == len(q)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for i in range(len(last)):
            pages = ids[starts[i] : starts[i + 1]].long()
            length = (len(pages) - 1) * cache[0].shape[1] + int(last[i])
            mine = slice(int(self.queries[i]), int(self.queries[i + 1]))
            out[mine] = self._attend(q[mine], *(half[pages].flatten(0, 1)[:length] for half in cache))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert (q.shape[1], k.shape[1]) == (self.options["num_qo_heads"], self.options["num_kv_heads"])
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
        positions = torch.arange(len(k) - len(q), len(k))[:, None]
        hidden = torch.arange(len(k)) > positions
        if self.options["window_left"] >= 0:
            hidden |= torch.arange(len(k)) < positions - self.options["window_left"]
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * self.options["sm_scale"]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q.dtype)


class Decode(Wrapper):
    def __init__(
        self, workspace: Tensor, layout: str, graph: bool, tensor_cores: bool, starts: Tensor, ids: Tensor,
        last: Tensor, backend: str,
    ) -> None:  # fmt: skip
        assert graph and layout == "NHD" and backend == "fa2"
        self.lists, self.queries = (starts, ids, last), torch.arange(len(last) + 1)

    def plan(self, starts: Tensor, ids: Tensor, last: Tensor, **options: Any) -> None:
        assert len(starts) == len(self.lists[0])
        self.planned, self.options = (starts.clone(), last.clone()), options


class Prefill(Wrapper):
    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(
        self, queries: Tensor, starts: Tensor, ids: Tensor, last: Tensor, *, causal: bool, **options: Any
    ) -> None:  # fmt: skip
        assert causal
        self.queries, self.lists, self.planned, self.options = queries, (starts, ids, last), (starts, last), options


def fast_decode_plan(
    wrapper: Decode, starts: Tensor, ids: Tensor, last: Tensor, *, global_override_indptr_cpu: Tensor, **options: Any
) -> None:
    assert starts.device.type == last.device.type == "cpu" and torch.equal(starts, global_override_indptr_cpu)
    wrapper.plan(starts, ids, last, **options)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The backend's module, over a package of the wrappers above."""
    package = ModuleType("flashinfer")
    vars(package).update({DECODE: Decode, PREFILL: Prefill, "fast_decode_plan": fast_decode_plan})
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setattr(torch.cuda, "Event", mock.Mock)
    kept = sys.modules.pop(MODULE, None)
    module = importlib.import_module(MODULE)
    monkeypatch.setattr(module, "WORKSPACE", 16)
    yield module
    del sys.modules[MODULE]
    if kept:
        sys.modules[MODULE] = kept


def backend(module: ModuleType) -> AttentionBackend:
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        return module.FlashInfer()


def run(batch: ForwardBatch, q: Tensor, scale: float, window: int | None) -> Tensor:
    """Two layers' worth; the second finds the plan."""
    batch.attention.prepare(batch)
    batch.attention.forward(q, 0, batch, scale, window)
    return batch.attention.forward(q, 0, batch, scale, window)


on_a_cpu = pytest.mark.skipif(not INTERPRETED, reason="the tests marked cuda do more")


@on_a_cpu
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("mix", MIXES)
def test_flashinfer_is_told_all_of_a_step(stand_in: ModuleType, mix: str, window: int | None) -> None:
    g = Geometry(6, 2, 64, 16)
    lens, counts = MIXES[mix]
    batch = make_batch(g, lens, counts, 1, backend(stand_in))
    q = make_queries(g, sum(counts), 1)
    got = run(batch, q, 0.3, window)
    assert got.shape == q.shape and got.dtype == q.dtype and got.is_contiguous()
    assert error(got, reference(q, batch, 0.3, window)) < TOLERANCE[g.dtype]


@on_a_cpu
def test_layers_with_windows_of_their_own_have_plans_of_their_own(stand_in: ModuleType) -> None:
    g = Geometry(4, 2, 64, 4)
    batch = make_batch(g, [40, 30, 25], [1, 1, 9], 0, backend(stand_in))
    q = make_queries(g, 11, 0)
    batch.attention.prepare(batch)
    for window in (None, 5, None, 5):
        got = batch.attention.forward(q, 0, batch, 0.3, window)
        assert error(got, reference(q, batch, 0.3, window)) < TOLERANCE[g.dtype]


@on_a_cpu
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_captured_steps_are_planned_before_each_replay(
    stand_in: ModuleType, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's run sees to it that the plan of the host and the lists of the device are of the same step."""
    oracle = make_checkpoint(family, tmp_path)
    driver = Driver(tmp_path, overlap=True, page_size=4, attention="torch_sdpa")
    runner = driver.engine.runner
    runner.attention = backend(stand_in)
    with torch.inference_mode():
        runner.graphs = Uncaptured(runner.model, runner.pool, runner.attention, runner.rows, batch_sizes(4), False)
    prompts = [[(7 * i + 3 * k) % 60 + 2 for i in range(4 + 9 * k)] for k in range(3)]
    replays = mock.Mock(wraps=runner.attention.before_replay)
    monkeypatch.setattr(runner.attention, "before_replay", replays)
    ids = [driver.add(prompt, replace(GREEDY, max_tokens=3 + 4 * k)) for k, prompt in enumerate(prompts)]
    driver.run()
    for k, (id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        assert driver.answers[id].tokens == greedy(oracle, prompt, 3 + 4 * k)
    assert {call.args[0] for call in replays.call_args_list} >= {1, 2, 3}
    driver.close()


def test_pages_are_listed_for_rows_of_a_larger_table() -> None:
    device = "cpu" if INTERPRETED else "cuda"
    table = torch.arange(9 * 700, dtype=torch.int32, device=device).view(9, 700)[:, :690]
    rows = torch.tensor([4, 8, 0, 5], dtype=torch.int32, device=device)
    for lens in ([1, 16, 17, 690 * 16], [5 * 16 - 1, 1, 600 * 16 + 1, 32]):
        counts = [-(-n // 16) for n in lens]
        pages = PageList.empty(4, torch.empty(sum(counts), dtype=torch.int32, device=device))
        list_pages(table, rows, torch.tensor(lens, dtype=torch.int32, device=device), 16, pages)
        assert pages.starts.tolist() == np.cumsum([0, *counts]).tolist()
        assert pages.ids.tolist() == [700 * r + i for r, n in zip(rows.tolist(), counts, strict=True) for i in range(n)]
        assert pages.last_counts.tolist() == [(n - 1) % 16 + 1 for n in lens]


def test_pages_of_many_sequences_are_listed() -> None:
    device = "cpu" if INTERPRETED else "cuda"
    lens = torch.randint(1, 100, (300,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    counts = -(-lens // 8)
    pages = PageList.empty(300, torch.empty(int(counts.sum()), dtype=torch.int32, device=device))
    table = torch.randint(0, 2**30, (300, 13), dtype=torch.int32)
    list_pages(table.to(device), None, lens.to(device), 8, pages)
    assert pages.ids.tolist() == [
        page for row, n in zip(table.tolist(), counts.tolist(), strict=True) for page in row[:n]
    ]


@on_a_cpu
def test_flashinfer_says_what_it_does_not_serve(stand_in: ModuleType) -> None:
    served = backend(stand_in)
    served.check(KVPool(1, 1, 128, 16, 1, torch.bfloat16, "cpu"))
    with pytest.raises(ConfigError, match=r"head_dim \(64, 128, 256\), not 80"):
        served.check(KVPool(1, 1, 80, 16, 1, torch.bfloat16, "cpu"))
    with pytest.raises(ConfigError, match="float32"):
        served.check(KVPool(1, 1, 64, 16, 1, torch.float32, "cpu"))
    with pytest.raises(ConfigError, match=r"capability 8\.0"):
        stand_in.FlashInfer()


def test_flashinfer_is_asked_for_by_name_only() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(ConfigError, match="pip install"):
        make_attention("flashinfer")
    with pytest.raises(ConfigError, match="one scale"):
        resolve(EngineConfig(attention="flashinfer", kv_cache_dtype="fp8"), detect())
    assert resolve(EngineConfig(), detect()).attention != "flashinfer"


# -- on a GPU ---------------------------------------------------------------------------------------------------------

GPU = (
    Geometry(16, 8, 128, 16, torch.bfloat16),  # decodes without matrix units
    Geometry(32, 8, 128, 16, torch.bfloat16),  # and with them
    Geometry(40, 8, 128, 1, torch.bfloat16),
    Geometry(8, 8, 128, 48, torch.bfloat16),
)


@pytest.fixture
def attention() -> AttentionBackend:
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer-python isn't installed")
    return make_attention("flashinfer")


def gpu_batch(g: Geometry, lens: list[int], counts: list[int], seed: int, attention: AttentionBackend) -> ForwardBatch:
    batch = make_batch(g, lens, counts, seed, attention)
    for half in (batch.pool.k, batch.pool.v):  # a pool holds no NaN
        half.nan_to_num_(0.0)
    return batch


@pytest.mark.cuda
@pytest.mark.timeout(1200)  # kernels may have to be compiled
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("g", GPU, ids=str)
def test_flashinfer_equals_reference(attention: AttentionBackend, g: Geometry, window: int | None) -> None:
    steps = [any_lens(seed + g.heads, 700) for seed in range(4)]
    for lens, counts in [*steps, ([100, 6000, 4000], [1, 300, 1500]), ([9000], [1]), ([70] * 300, [70] * 300)]:
        batch = gpu_batch(g, lens, counts, 0, attention)
        q = make_queries(g, sum(counts), 0)
        assert error(run(batch, q, 0.1, window), reference(q, batch, 0.1, window)) < TOLERANCE[g.dtype]


@pytest.mark.cuda
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", [5, 200])  # sequences are split, or fill the GPU as they are
@pytest.mark.parametrize("g", GPU[:2], ids=str)
def test_flashinfer_graph_replays_with_other_lengths(attention: AttentionBackend, g: Geometry, size: int) -> None:
    most = 900
    batch = gpu_batch(g, [most] * size, [1] * size, 0, attention)
    batch.table_rows = torch.arange(size, dtype=torch.int32, device="cuda")
    q = make_queries(g, size, 0)

    def step() -> Tensor:
        attention.prepare(batch)
        return attention.forward(q, 0, batch, 0.1, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        lens = torch.randint(1, most + 1, (size,), dtype=torch.int32, generator=rng)
        batch.seq_lens.copy_(lens)
        batch.page_table.copy_(batch.page_table[torch.randperm(size, generator=rng)])
        q.copy_(torch.randn(q.shape, generator=rng))
        attention.before_replay(size, batch.page_table.shape[1], (lens - 1).tolist())
        graph.replay()
        assert error(got, reference(q, batch, 0.1, None)) < TOLERANCE[g.dtype]


@pytest.mark.cuda
@pytest.mark.timeout(1200)
def test_flashinfer_does_not_wait_for_the_gpu(attention: AttentionBackend) -> None:
    batch = gpu_batch(GPU[0], [900, 30, 500], [1, 1, 70], 0, attention)
    q = make_queries(GPU[0], 72, 0)
    run(batch, q, 0.1, None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(batch, q, 0.1, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
