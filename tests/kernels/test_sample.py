"""The sampling kernel against its definition in torch, with its arguments as the engine's steps lay them out."""

from __future__ import annotations

import pytest
import torch

from minisgl.engine.state import RowParams
from minisgl.kernels.sample.noise import gumbel_noise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, ROWS = 5001, 5


def _check(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from minisgl.kernels.sample import triton_v1

    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(ROWS, VOCAB, generator=generator) * 3).to(DEVICE, dtype)
    words = torch.randint(0, 2**31 - 1, (ROWS, 8), generator=generator, dtype=torch.int32).to(DEVICE)
    words.view(torch.float32)[:, 0] = torch.tensor([0.7, 0.0, 1.0, 2.0, 0.0])
    params = RowParams(words)
    assert params.seed.stride() == (4,), "read where it lies"
    index = torch.tensor([0, 3, 9, 100, 7], dtype=torch.int32, device=DEVICE)
    hot = torch.where(params.temperature == 0, 1.0, params.temperature)[:, None]
    noise = gumbel_noise(params.seed, index.long(), VOCAB) * (params.temperature > 0)[:, None]
    expected = (logits.float() / hot + noise).argmax(-1)

    out = torch.full((ROWS,), -1, dtype=torch.int64, device=DEVICE)
    rows = torch.tensor([4, 0, 9, 2, 6], dtype=torch.int32, device=DEVICE)
    last = torch.full((11,), -7, dtype=torch.int32, device=DEVICE)
    triton_v1.run(logits, params.temperature, params.seed, index, out, 0, None, rows, last)
    assert out.tolist() == expected.tolist()
    assert last[rows.long()].tolist() == expected.tolist()
    assert (last == -7).sum() == 6, "no other row was touched"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the test marked cuda does the same")
def test_sample_interpreted_equals_its_definition() -> None:
    _check(torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_equals_its_definition(dtype: torch.dtype) -> None:
    _check(dtype)
