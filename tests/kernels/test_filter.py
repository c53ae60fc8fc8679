"""top-k, top-p and min-p: the search keeps exactly what the sort keeps, ties included."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from minisgl.kernels.sample.filter import filter_logits, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OFF = (0, 1.0, 0.0)
EDGE = 1e-5  # what may lie at the edge of p: on a GPU exponentials of torch and of Triton differ in the last bits
SETTINGS = [  # top_k, top_p, min_p
    OFF, (1, 1.0, 0.0), (5, 1.0, 0.0), (10_000, 1.0, 0.0), (0, 0.7, 0.0), (0, 0.999, 0.0), (0, 1e-6, 0.0),
    (0, 1.0, 0.2), (20, 0.9, 0.02), (3, 0.5, 0.9), (40, 0.3, 0.0), (0, 0.95, 0.05),
]  # fmt: skip


def _params(rows: list[tuple[int, float, float]], temperature: float) -> list[Tensor]:
    """As views of one tensor, the way they lie in the engine: temperature, top_k, top_p, min_p."""
    words = torch.zeros(len(rows), 8, dtype=torch.int32, device=DEVICE)
    floats = words.view(torch.float32)
    for i, (k, p, least) in enumerate(rows):
        floats[i, 0], floats[i, 1], floats[i, 2], words[i, 3] = temperature, p, least, k
    return [floats[:, 0], words[:, 3], floats[:, 1], floats[:, 2]]


def _search(logits: Tensor, params: list[Tensor]) -> None:
    pytest.importorskip("triton")
    from minisgl.kernels.sample import triton_filter

    triton_filter.run(logits, *params)


def _check(logits: Tensor, temperature: float, settings: list[tuple[int, float, float]]) -> None:
    """Every setting on every row of `logits`."""
    pairs = list(itertools.product(range(len(logits)), settings))
    expected = logits[[i for i, _ in pairs]].to(DEVICE)
    params = _params([s for _, s in pairs], temperature)
    got = expected.clone()
    reference(expected, *params)
    _search(got, params)
    for (i, setting), x, y in zip(pairs, expected, got, strict=True):
        slack = EDGE if DEVICE.type == "cuda" and setting[1:] != OFF[1:] else 0.0
        assert _same(x, y, temperature, slack), (i, setting, int(x.isfinite().sum()), int(y.isfinite().sum()))


def _same(x: Tensor, y: Tensor, temperature: float, slack: float) -> bool:
    """Whether the same tokens are left, but for some that together have at most `slack` of the probability."""
    differ = x.isfinite() != y.isfinite()
    share = (torch.maximum(x, y).double() / temperature).softmax(-1)
    return torch.equal(x[~differ], y[~differ]) and float(share[differ].sum()) <= slack


def _all(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    random = torch.randn(2, vocab, generator=generator) * 3
    coarse = (random[:1] * 0.7).round()  # ties by the hundred, zeros of both signs
    level = torch.full((1, vocab), -2.5)
    forbidden = random[:1].clone()
    forbidden[0, 3:] = float("-inf")
    _check(torch.cat((random, coarse, level, forbidden)).to(dtype), 0.7, SETTINGS)
    _check(random.to(dtype), 5.0, SETTINGS[4:6])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tests marked cuda do more")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filter_interpreted_keeps_what_the_sort_keeps(dtype: torch.dtype) -> None:
    _all(211, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("vocab", [5, 4096, 49_153, 151_936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filter_keeps_what_the_sort_keeps(vocab: int, dtype: torch.dtype) -> None:
    _all(vocab, dtype)


def test_filter_crosses_blocks_with_ties() -> None:
    """The tie that is cut off lies in the second block of the vocabulary."""
    logits = torch.zeros(1, 4200)
    logits[0, ::7] = 1.0
    _check(logits, 1.0, [(590, 1.0, 0.0), (4150, 1.0, 0.0), (0, 0.5, 0.0)])


def test_filter_leaves_greedy_rows_alone() -> None:
    logits = torch.randn(2, 50, device=DEVICE)
    before = logits.clone()
    temperature, *rest = _params([(3, 0.5, 0.1)] * 2, 0.0)
    filter_logits(logits, temperature, *rest)
    _search(logits, [temperature, *rest])
    assert torch.equal(logits, before)


def test_filter_breaks_ties_by_id_and_counts_exactly() -> None:
    """Of eight equal tokens a quarter are two, the first two."""
    logits = torch.full((2, 8), 1.5, device=DEVICE)
    filter_logits(logits, *_params([(0, 0.25, 0.0), (3, 1.0, 1.0)], 1.0))
    assert logits.isfinite().tolist() == [[True] * 2 + [False] * 6, [True] * 3 + [False] * 5]
