"""What a GPU's memory goes to: the arithmetic anywhere, the measurement on a GPU."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import GREEDY, Driver
from tiny import make_checkpoint

from minisgl.attention import make_attention
from minisgl.cache.pool import KVPool
from minisgl.config import EngineConfig
from minisgl.engine.budget import Budget, explained, largest_prefill
from minisgl.engine.memory import choose_num_pages
from minisgl.engine.state import DeviceRows
from minisgl.models.registry import load_model
from minisgl.types import ConfigError

GB = 10**9
PAGE = KVPool(2, 1, 24, 16, 1, torch.float32, "cpu").page_bytes
BUDGET = Budget(total=80 * GB, others=GB, weights=16 * GB, activations=3 * GB, graphs=2 * GB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint("qwen3", path)
    return path


def test_budget_leaves_the_pool_what_the_fraction_allows() -> None:
    assert BUDGET.room(0.9) == 50 * GB
    table = BUDGET.table(49 * GB, 340_000)
    assert [float(line.split()[0]) for line in table.splitlines()] == [80, 1, 16, 3, 2, 49, 9]
    assert "49.00 GB  KV pool of 340,000 tokens" in table and table.endswith("left")


def _choose(budget: Budget, folder: Path, **options: Any) -> int:
    config = EngineConfig(device="cuda", max_running=64, max_batched_tokens=2048, **options)
    shape = load_model(folder, torch.float32, torch.device("cpu"), progress=False).config
    return choose_num_pages(config, shape, torch.float32, PAGE, 10**6, budget)


def test_pool_takes_the_room_of_the_budget(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    small = replace(BUDGET, total=23 * GB)
    assert _choose(small, folder, mem_fraction=1.0) == GB // PAGE - 1
    assert "3.00 GB  activations" in caplog.text
    with pytest.raises(ConfigError, match="max-batched-tokens or --max-running, or raise --mem-fraction"):
        _choose(small, folder, mem_fraction=0.9)


def test_memory_that_runs_out_at_start_names_what_to_lower() -> None:
    named = "--mem-fraction, --max-batched-tokens, --max-running or --max-model-len"
    with pytest.raises(ConfigError, match=named), explained():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    with pytest.raises(ZeroDivisionError), explained():
        raise ZeroDivisionError


@pytest.mark.parametrize(("tokens", "context", "lens"), [(100, 40, [40, 40, 20]), (30, 512, [30]), (80, 40, [40, 40])])
def test_largest_prefill_is_a_step_that_runs(folder: Path, tokens: int, context: int, lens: list[int]) -> None:
    model = load_model(folder, torch.float32, torch.device("cpu"), progress=False)
    pool = KVPool(2, model.num_kv_heads_per_rank, 24, 16, 1, torch.float32, "cpu")
    config = EngineConfig(max_batched_tokens=tokens, max_running=9)
    rows = DeviceRows(9, -(-context // 16), pool.dummy_page, torch.device("cpu"))
    batch = largest_prefill(config, context, pool, make_attention("torch_sdpa"), rows)
    assert batch.seq_lens.tolist() == lens and batch.query_starts.tolist() == [0, *np.cumsum(lens)]
    assert batch.positions.tolist() == [i for n in lens for i in range(n)]
    with torch.inference_mode():
        logits = model.forward(batch)
    assert logits.shape == (9, model.config.vocab_size) and logits.isfinite().all()


@pytest.mark.cuda
def test_steps_stay_within_the_measured_budget(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    driver = Driver(folder, device="cuda", num_pages=None, max_batched_tokens=4096, max_running=64, mem_fraction=0.5)
    told = {w[2]: float(w[0]) for w in map(str.split, caplog.text.splitlines()) if len(w) == 3 and w[1] == "GB"}
    assert told["weights"] >= 0 and "KV pool of" in caplog.text
    reserved = torch.cuda.memory_reserved()
    prompts = [[(i + k) % 100 + 2 for k in range(400)] for i in range(20)]
    ids = [driver.add(p, replace(GREEDY, max_tokens=20, presence_penalty=0.1 * (i % 2))) for i, p in enumerate(prompts)]
    driver.run()
    assert all(len(driver.answers[id].tokens) == 20 for id in ids)
    grown = (torch.cuda.memory_reserved() - reserved) / 1e9
    assert grown <= told["activations"] + told["graphs"] + 0.1, (grown, told)
    driver.close()
