"""Samplers that see a range of the vocabulary each choose what one that sees it all does."""

from __future__ import annotations

from typing import Any

import model_bodies as bodies
import numpy as np
import pytest
import torch
from worlds import run_world

from minisgl.distributed import TPGroup
from minisgl.engine.vocab_parallel import pack_pairs, unpack_pairs
from minisgl.kernels import cpu
from minisgl.types import SamplingParams

VOCAB = 1003


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.8} | values)


PENALISED = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.4}
REQUESTS = [
    params(temperature=0.0),
    params(),
    params(seed=5),
    params(top_k=1),
    params(top_k=7),
    params(top_k=40, top_p=0.9, min_p=0.02),
    params(top_k=400),  # too many to send pairs
    params(top_p=0.7),
    params(min_p=0.1),
    params(temperature=0.0, **PENALISED),
    params(**PENALISED),
    params(top_k=9, logit_bias={1: 3.0, 500: 5.0, 1002: 5.0}),
    params(temperature=0.0, logit_bias={1002: 100.0}),
    params(temperature=0.0, min_tokens=2, stop_token_ids=[0, 501, 1002]),
    params(logprobs=True, top_logprobs=5),
    params(temperature=0.0, logprobs=True),
]


def logits(ties: bool) -> np.ndarray:
    """[R, V]; with `ties`, few values, so that the largest of them stands in many places."""
    values = np.random.default_rng(3).normal(size=(len(REQUESTS), VOCAB)).astype(np.float32) * 3
    return np.round(values.clip(-4, 4)) if ties else values


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("native", [False, True] if cpu.available() else [False])
def test_ranks_draw_the_tokens_of_one(size: int, native: bool) -> None:
    requests = [REQUESTS, [p for p in REQUESTS if not p.logprobs]]
    cases = [(logits(False), requests[0]), (logits(True)[: len(requests[1])], requests[1])]
    expected = [bodies.draws(TPGroup(), *case, native) for case in cases]
    for rank in run_world(size, bodies.all_draws, cases, native):
        for ours, one in zip(rank, expected, strict=True):
            for (tokens, *numbers), (their_tokens, *theirs) in zip(ours, one, strict=True):
                assert tokens == their_tokens
                for mine, other in zip(numbers, theirs, strict=True):
                    assert (mine is None) == (other is None)
                    np.testing.assert_allclose(mine or 0, other or 0, rtol=0, atol=2e-6)


def test_equal_logits_go_to_the_smallest_id() -> None:
    row = np.zeros((2, VOCAB), np.float32)
    row[0, [130, 700, 1002]] = row[1, [1000, 1002]] = 4.0
    for rank in run_world(4, bodies.draws, row, [params(temperature=0.0)] * 2, True):
        assert [tokens for tokens, *_ in rank] == [[130, 1000]] * 3


def test_packed_pairs_sort_as_pairs_do() -> None:
    special = [0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, 3.4e38, -3.4e38, float("inf"), float("-inf")]
    values = torch.tensor(special + torch.randn(50).tolist() + special)
    ids = torch.randperm(len(values)) * 60_000_000  # nearly 2^32
    pairs = pack_pairs(values, ids)
    order = sorted(range(len(values)), key=lambda i: (-float(values[i]), int(ids[i])))
    assert pairs.argsort(descending=True).tolist() == order
    back, their_ids = unpack_pairs(pairs)
    assert torch.equal(back, values) and torch.equal(their_ids, ids)
