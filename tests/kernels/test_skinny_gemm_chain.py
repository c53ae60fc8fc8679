"""Dependent launches of skinny_gemm: thousands of replays of a chain in which every product needs the one before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisgl.kernels.skinny_gemm.op import skinny_gemm
from minisgl.kernels.tuning import Config

HIDDEN, INNER, LAYERS, INPUTS = 512, 1536, 6, 40


class Chain:
    """Layers of products as a decoder has them, attention left out, over fixed buffers in a graph."""

    def __init__(self, batch: int, config: Config) -> None:
        rng = torch.Generator("cuda").manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=rng, device="cuda").mul_(size[-1] ** -0.5).bfloat16()

        self.stream = torch.zeros(batch, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.qkv, self.inner = self.stream.new_empty(batch, HIDDEN), self.stream.new_empty(batch, INNER)
        self.gain = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
        sizes = ((HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))
        self.weights = [[normal(*size) for size in sizes] for _ in range(LAYERS)]
        self.config = config
        self.run()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self) -> None:
        for qkv, o, gate_up, down in self.weights:
            skinny_gemm(self.stream, qkv, self.qkv, self.gain, 1e-6, config=self.config)
            skinny_gemm(self.qkv, o, self.stream, add=True, config=self.config)
            skinny_gemm(self.stream, gate_up, self.inner, self.gain, 1e-6, gated=True, config=self.config)
            skinny_gemm(self.inner, down, self.stream, add=True, config=self.config)

    def __call__(self, x: Tensor) -> Tensor:
        """Of a buffer that is written again at the next call."""
        self.stream.copy_(x)
        self.qkv.fill_(torch.nan)
        self.inner.fill_(torch.nan)
        self.graph.replay()
        return self.stream


@pytest.mark.cuda
@pytest.mark.parametrize(("batch", "threads", "work"), [(1, 256, 1), (8, 128, 2), (40, 512, 1)])
def test_skinny_chain_is_the_same_with_dependent_launches(batch: int, threads: int, work: int) -> None:
    inputs = torch.randn(INPUTS, batch, HIDDEN, device="cuda").bfloat16()
    plain = Chain(batch, Config(threads, work, pdl=False))
    wanted = torch.stack([plain(x).clone() for x in inputs])
    assert wanted.isfinite().all() and wanted.unique(dim=0).shape[0] == INPUTS
    chain = Chain(batch, Config(threads, work, pdl=True))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(3000):
        wrong += (chain(inputs[i % INPUTS]) != wanted[i % INPUTS]).any()
    assert not int(wrong)
