"""A layer's matrix products one behind another, as a decode step has them: what a configuration is worth there.

By itself a product runs behind others of its kind, which leave it idle multiprocessors to load its weights on. In a
layer the product before it may hold all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minisgl.hardware import detect
from minisgl.kernels.rmsnorm.op import add_rmsnorm
from minisgl.kernels.silu_mul.op import silu_mul
from minisgl.kernels.skinny_gemm.cases import SPEC
from minisgl.kernels.skinny_gemm.op import product_name, skinny_gemm, tiling
from minisgl.kernels.spec import Shape
from minisgl.kernels.tuning import Config, choose_product
from minisgl.profiling.products import DTYPE, products
from minisgl.profiling.replay import replay_us

Choice = Mapping[str, Config]  # by product: qkv, o, gate_up, down
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one layer, as [rows, columns]."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class Chain:
    """Layers with weights of their own, together three times the L2 cache, over the same activations.

    In the place of attention a kernel copies queries: behind QKV, before O, and not by dependent launch.
    """

    def __init__(self, model: str, batch: int) -> None:
        cuda = detect().cuda
        assert cuda is not None
        self.shapes: dict[str, Shape] = {name: shape for name, shape in products(model, batch) if name != "head"}
        rng = torch.Generator("cuda").manual_seed(0)

        def normal(n: int, k: int) -> Tensor:
            return torch.randn(n, k, generator=rng, device="cuda", dtype=DTYPE).mul_(k**-0.5)

        size = sum(shape["n"] * shape["k"] for shape in self.shapes.values()) * DTYPE.itemsize
        self.num_layers = max(-(-3 * cuda.l2_bytes // size), 2)
        self.layers = [
            Weights(**{name: normal(shape["n"], shape["k"]) for name, shape in self.shapes.items()})
            for _ in range(self.num_layers)
        ]
        self.stream = normal(batch, self.shapes["qkv"]["k"])
        self.gain = torch.ones_like(self.stream[0])
        self.qkv = self.stream.new_empty(batch, self.shapes["qkv"]["n"])
        self.heads = self.stream.new_empty(batch, self.shapes["o"]["k"])
        self.inner = self.stream.new_empty(batch, self.shapes["down"]["k"])

    def ours(self, choice: Choice) -> None:
        for layer in self.layers:
            skinny_gemm(self.stream, layer.qkv, self.qkv, self.gain, EPS, config=choice["qkv"])
            self.heads.copy_(self.qkv[:, : self.heads.shape[1]])
            skinny_gemm(self.heads, layer.o, self.stream, add=True, config=choice["o"])
            gate_up = choice["gate_up"]
            skinny_gemm(self.stream, layer.gate_up, self.inner, self.gain, EPS, gated=True, config=gate_up)
            skinny_gemm(self.inner, layer.down, self.stream, add=True, config=choice["down"])

    def cublas(self) -> None:
        x = self.stream
        for layer in self.layers:
            normed = torch.empty_like(x)
            add_rmsnorm(x, self.stream, self.gain, EPS, normed)
            self.heads.copy_(F.linear(normed, layer.qkv)[:, : self.heads.shape[1]])
            x = F.linear(self.heads, layer.o)
            add_rmsnorm(x, self.stream, self.gain, EPS, normed)
            silu_mul(F.linear(normed, layer.gate_up), self.inner)
            x = F.linear(self.inner, layer.down)

    def us(self, run: Callable[[], None]) -> float:
        """Microseconds a layer."""
        self.stream.normal_()
        return statistics.median(replay_us([run], samples=7)) / self.num_layers

    def tuned(self) -> dict[str, Config]:
        """The table's configurations, or the first for a product that it leaves to cuBLAS."""
        found = {}
        for name, s in self.shapes.items():
            product = product_name(s["n"], s["k"], bool(s["norm"]), bool(s["gated"]), bool(s["add"]))
            found[name] = choose_product(product, 0, s["tokens"]) or Config(512, 4)
        return found


def bench_chain(model: str, batch: int) -> Iterator[tuple[str, float]]:
    """What, and microseconds a layer: cuBLAS; the table; the table but for one product."""
    chain = Chain(model, batch)
    tuned = chain.tuned()
    yield "cublas", chain.us(chain.cublas)
    yield "table", chain.us(lambda: chain.ours(tuned))
    for name, shape in chain.shapes.items():
        seen = {tiling(shape, tuned[name])}
        for config in SPEC.configs:
            if (tiles := tiling(shape, config)) not in seen:
                seen.add(tiles)
                choice = tuned | {name: config}
                what = f"{name} [{config.threads}, {config.work}]"
                yield what, chain.us(lambda c=choice: chain.ours(c))  # type: ignore[misc]
