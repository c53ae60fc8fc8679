"""Ranks on the GPUs of one host, as many as there are: NCCL, CUDA graphs, and a rank that dies under a collective.

A start takes many seconds, so there are few. What the ranks' start takes, and where they are when they hang:

    pytest -s -o log_cli=1 --log-cli-level=DEBUG -o faulthandler_timeout=60 -m cuda tests/distributed/test_ranks_cuda.py
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch
from rank_world import LIMIT_S, assert_gone, greedy, prompt, rank_pids, script

from minisgl import LLM

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(300, method="thread")]
PROMPTS = [prompt(4 + 9 * i, i) for i in range(12)]
PARAMS = [greedy(8 + 4 * i) for i in range(12)]
SMALL = {"device": "cuda", "page_size": 8, "num_pages": 100, "max_batched_tokens": 64, "max_running": 16}  # preempts
MEASURED = {"num_pages": None, "mem_fraction": 0.2}  # the ranks agree on how many
STACKS_S = 60  # after which ranks that hang show where


@pytest.fixture(scope="module")
def expected(tp_model: Path) -> list[list[int]]:
    with LLM(str(tp_model), dtype="float32", cuda_graph=False, **SMALL) as llm:
        return [r.token_ids for r in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(params=[2, 4, 8])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed")
    monkeypatch.setenv("MINISGL_WATCH_RANKS", str(STACKS_S))
    return int(request.param)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_ranks_on_gpus_give_the_tokens_of_one(
    tp_model: Path, size: int, graphs: bool, expected: list[list[int]]
) -> None:
    """Both in one process: the second group meets ranks that were in none before."""
    options = SMALL if graphs else SMALL | MEASURED
    with LLM(str(tp_model), dtype="float32", cuda_graph=graphs, tp_size=size, **options) as llm:
        for _ in range(2):  # the second time from the prefix cache
            assert [r.token_ids for r in llm.generate(PROMPTS, PARAMS)] == expected
        pids = rank_pids(llm)
    assert_gone(pids)


def test_rank_killed_on_a_gpu_ends_the_group(tp_model: Path, size: int, tmp_path: Path) -> None:
    """In a process of its own, which ends with the rank if its GPU can't be freed from waiting for it."""
    body = f"""
import os, signal, threading, time
from minisgl.types import EngineDeadError
llm = LLM(**(options | {SMALL | {"tp_size": size}!r}))
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8))
pids = [p.pid for p in llm.engine._ranks._processes]
print(*pids, flush=True)
threading.Timer(0.3, os.kill, (pids[-1], signal.SIGKILL)).start()
try:
    while True:
        llm.generate([[i, 2, 3] for i in range(12)], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
except EngineDeadError as error:
    print(error, flush=True)
    os._exit(0)
"""
    process, began = script(body, tp_model, tmp_path), time.monotonic()
    try:
        out, err = process.communicate(timeout=2 * LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    print(f"{time.monotonic() - began:.0f} s, exit code {process.returncode}\n{out}\n{err}")
    assert "was killed (signal 9)" in out + err
    assert process.returncode == 0, "the GPU wasn't freed"
    assert_gone([int(pid) for pid in out.splitlines()[0].split()])
