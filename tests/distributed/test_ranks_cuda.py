"""Ranks on the GPUs of one host, as many as there are: NCCL, CUDA graphs, and a rank that dies under a collective."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_world import LIMIT_S, assert_gone, folder, greedy, prompt, rank_pids

from minisgl import LLM
from minisgl.types import EngineDeadError

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(900)]
PROMPTS = [prompt(4 + 9 * i, i) for i in range(12)]
PARAMS = [greedy(8 + 4 * i) for i in range(12)]


@pytest.fixture(params=[2, 4, 8])
def size(request: pytest.FixtureRequest) -> Iterator[int]:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed")
    yield request.param


def load(model: Path, **options: object) -> LLM:
    small = {"page_size": 8, "num_pages": 100, "max_batched_tokens": 64, "max_running": 16}
    return LLM(str(model), device="cuda", **(small | options))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_ranks_on_gpus_give_the_tokens_of_one(tp_model: Path, size: int, graphs: bool) -> None:
    options = {"dtype": "float32", "cuda_graph": graphs}
    expected = [r.token_ids for r in load(tp_model, **options).generate(PROMPTS, PARAMS)]
    with load(tp_model, tp_size=size, **options) as llm:
        for _ in range(2):  # the second time from the prefix cache
            assert [r.token_ids for r in llm.generate(PROMPTS, PARAMS)] == expected
        pids = rank_pids(llm)
    assert_gone(pids)


def test_ranks_on_gpus_agree_on_the_pool(tp_model: Path, size: int) -> None:
    with load(tp_model, tp_size=size, num_pages=None, mem_fraction=0.2) as llm:
        assert len(llm.generate(PROMPTS, PARAMS)) == len(PROMPTS)


def test_rank_killed_on_a_gpu_ends_the_group(tp_model: Path, size: int) -> None:
    llm = load(tp_model, tp_size=size)
    llm.generate(PROMPTS, PARAMS)
    pids, path = rank_pids(llm), folder(llm)
    timer = threading.Timer(0.2, os.kill, (pids[-1], signal.SIGKILL))
    timer.start()
    began = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"was killed \(signal 9\)"):
        while time.monotonic() < began + LIMIT_S:
            llm.generate(PROMPTS, PARAMS)
    timer.join()
    assert_gone(pids, path)
