"""The sampling kernel on ranges of the vocabulary: the best of the ranges' best is what one launch over all finds."""

from __future__ import annotations

import interpreter  # noqa: F401 (before Triton)
import pytest
import torch

from minisgl.kernels.sample.noise import gumbel_noise

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranges_of_the_vocabulary_give_the_token_of_the_whole(dtype: torch.dtype) -> None:
    from minisgl.kernels.sample import triton_v1

    rows, vocab, width = 5, 9001, 4504  # the first range takes two blocks, the second isn't whole
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator, device=DEVICE) * 3).to(dtype)
    temperature = torch.tensor([0.0, 1.0, 0.7, 0.0, 2.0], device=DEVICE)
    seeds = torch.tensor([1, 2, -3, 4, 1 << 40], device=DEVICE)
    index = torch.tensor([0, 1, 2, 3, 1000], dtype=torch.int32, device=DEVICE)
    logits[3, [17, 8000]] = 50.0  # equal: the smaller id wins

    def run(first: int, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, best = torch.empty_like(seeds), torch.empty_like(temperature)
        triton_v1.run(part, temperature, seeds, index, out, first, best)
        return out, best

    whole, value = run(0, logits)
    (low, low_value), (high, high_value) = run(0, logits[:, :width]), run(width, logits[:, width:])
    assert torch.equal(torch.where(low_value >= high_value, low, high), whole) and whole[3] == 17
    assert torch.equal(torch.maximum(low_value, high_value), value)
    noise = gumbel_noise(seeds, index.long(), vocab - width, width)
    scaled = logits[:, width:].float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    expected = torch.where((temperature > 0)[:, None], scaled + noise, scaled)
    torch.testing.assert_close(high_value, expected.amax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(expected.gather(1, high[:, None] - width)[:, 0], high_value, rtol=0, atol=1e-5)
