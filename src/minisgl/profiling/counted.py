"""One launch of each kernel that the engine runs, at a few sizes, for Nsight Compute to count in.

`python -m minisgl.profiling.counted NAME` makes the launches of one name of `COUNTED`. A first launch, which compiles,
is outside of the range that cudaProfilerStart and cudaProfilerStop mark: `ncu --profile-from-start off` sees the second
alone. That each name is a process of its own keeps what was measured when a later one takes too long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

from minisgl.attention import make_attention
from minisgl.kernels.skinny_gemm.cases import SPEC
from minisgl.kernels.skinny_gemm.op import skinny_gemm, tuned
from minisgl.kernels.spec import Shape, registry
from minisgl.profiling.attention import Workload, decodes, layer_calls, prefills
from minisgl.profiling.products import products

MODEL = "qwen3-0.6b"
SIZES = (1, 64, 4096)  # tokens: the launch binds, a batch of decodes, memory binds
DECODES = ((1, 672), (32, 672), (8, 4096))
PREFILLS = ((1, 512, 0), (4, 2048, 0))
PRODUCT_ROWS = 8
PRODUCTS = "skinny_gemm"
COUNTED = {  # names, in the order of what a report misses most, and what their kernels' names match
    "index": "^index", "store": "^store", "qkv_post": "^qkv_post", PRODUCTS: "^skinny_gemm", "rmsnorm": "^rmsnorm",
    "attention-decode": "^_", "attention-prefill": "^_",
}  # fmt: skip


def calls(name: str) -> Iterator[Callable[[], object]]:
    """What is launched for a name of `COUNTED`: a case a size class."""
    if name.startswith("attention"):
        works = decodes(MODEL, DECODES) if name.endswith("decode") else prefills(MODEL, PREFILLS)
        yield from map(_attention, works)
    elif name == PRODUCTS:
        for _, shape in products(MODEL, PRODUCT_ROWS):
            yield from _product(shape)
    else:
        (shape, *_) = registry()[name].bench
        for tokens in SIZES:
            yield _kernel(name, {**shape, "tokens": tokens})


def _kernel(name: str, shape: Shape) -> Callable[[], object]:
    spec = registry()[name]
    args = spec.inputs(shape, torch.bfloat16, torch.device("cuda"), torch.Generator("cuda").manual_seed(0), 1)[0]
    return lambda: spec.run(*args)


def _product(shape: Shape) -> Iterator[Callable[[], object]]:
    """As the engine makes it, unless it leaves this product to cuBLAS."""
    inputs = SPEC.inputs(shape, torch.bfloat16, torch.device("cuda"), torch.Generator("cuda").manual_seed(0), 1)[0]
    config = tuned(inputs[0], inputs[1], bool(shape["norm"]), bool(shape["gated"]), bool(shape["add"]))
    if config is not None:
        yield lambda: skinny_gemm(*inputs, config=config)


def _attention(work: Workload) -> Callable[[], object]:
    """One layer's, of two: the pool needn't exceed the caches, which ncu empties before each pass."""
    batch = work.batch(make_attention("triton"))
    return layer_calls(work, batch)[0]


def run(name: str) -> None:
    """Makes the launches of `name`, each first outside of the range."""
    for call in calls(name):
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    run(sys.argv[1])
