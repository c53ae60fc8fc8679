"""The mixture of experts in Triton against plain torch: interpreted, compiled, and (marked cuda) on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import minisgl
from minisgl.kernels.moe.op import moe
from minisgl.types import KernelError

pytest.importorskip("triton")

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Shape:
    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    spread: str = "even"  # or "one": all tokens choose the same experts
    normalise: bool = True


SMALL = (
    Shape(1, 5, 2, 40, 24),
    Shape(1, 4, 1, 16, 8, normalise=False),
    Shape(7, 128, 8, 33, 17),  # most experts get nothing
    Shape(40, 3, 3, 64, 96, normalise=False),  # every token to every expert
    Shape(33, 8, 2, 48, 31, spread="one"),
    Shape(70, 6, 2, 130, 70),
)


def arguments(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """x, logits (no two of a token alike), gate_up, down, out, top_k, normalise."""
    rng = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=rng, device=DEVICE) * size[-1] ** -0.5).to(dtype)

    rows = 1 if shape.spread == "one" else shape.tokens
    order = torch.rand(rows, shape.experts, generator=rng, device=DEVICE).argsort(-1)
    logits = (order.expand(shape.tokens, -1) / shape.experts * 6 - 3).to(dtype)
    weights = normal(shape.experts, 2 * shape.inner, shape.hidden), normal(shape.experts, shape.hidden, shape.inner)
    x = torch.randn(shape.tokens, shape.hidden + 3, generator=rng, device=DEVICE).to(dtype)[:, : shape.hidden]
    out = torch.full((shape.tokens, shape.hidden), torch.nan, dtype=dtype, device=DEVICE)
    return x, logits, *weights, out, shape.top_k, shape.normalise


def expected(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, _: Tensor, top_k: int, scaled: bool) -> Tensor:
    """The definition, token by token, in float64."""
    x, logits, gate_up, down = (y.double() for y in (x, logits, gate_up, down))
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True) if scaled else weights
    rows = []
    for token, picks, shares in zip(x, chosen, weights, strict=True):
        gate, up = torch.einsum("eih,h->ei", gate_up[picks], token).chunk(2, -1)
        rows.append(torch.einsum("e,ehi,ei->h", shares, down[picks], torch.nn.functional.silu(gate) * up))
    return torch.stack(rows)


def check(shape: Shape, dtype: torch.dtype, run: Any, seed: int = 0, add: bool = False, **options: Any) -> None:
    args = arguments(shape, dtype, seed)
    if add:
        args[4].copy_(args[0])
    run(*args, **options, add=add)
    want, got = expected(*args) + args[0].double() * add, args[4].double()
    error = float((got - want).norm() / want.norm())
    assert error < TOLERANCE[dtype], (shape, error)  # NaN, where nothing was written, is no less


@pytest.mark.skipif(not INTERPRETED, reason="the tests marked cuda do more")
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_moe_interpreted_equals_reference(shape: Shape) -> None:
    from minisgl.kernels.moe import triton_v1

    check(shape, torch.float32, triton_v1.run)
    check(shape, torch.float16, triton_v1.run, seed=1)
    check(shape, torch.float32, triton_v1.run, seed=3, add=True)
    check(shape, torch.float32, triton_v1.run, seed=2, tile=triton_v1.Tile(32, 64, 16, 4, 2))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's atomics are in order")
def test_moe_does_not_depend_on_the_other_rows() -> None:
    from minisgl.kernels.moe import triton_v1

    x, logits, gate_up, down, out, *rest = arguments(Shape(24, 6, 2, 40, 24), torch.float32)
    triton_v1.run(x, logits, gate_up, down, out, *rest)
    alone = torch.empty_like(out[:1])
    for i in (0, 11, 23):
        triton_v1.run(x[i : i + 1], logits[i : i + 1], gate_up, down, alone, *rest)
        assert torch.equal(alone[0], out[i])


def test_moe_names_the_bad_argument() -> None:
    x, logits, gate_up, down, out, *rest = (
        a.cpu() if isinstance(a, Tensor) else a for a in arguments(SMALL[0], torch.float32)
    )
    bad: dict[str, tuple[Tensor, ...]] = {
        "x is on": (x, logits, gate_up, down, out),
        "logits": (x, logits[:, :-1], gate_up, down, out),
        "gate_up": (x, logits, gate_up[:, :-1], down, out),
        "down": (x, logits, gate_up, down.half(), out),
        "out": (x, logits, gate_up, down, out.T),
    }
    for name, args in bad.items():
        with pytest.raises(KernelError, match=rf"^{name}"):
            moe(*args, *rest)


BUILDS = [
    ("gated", 90, 1),
    ("plain", 90, 20),
    ("gated", 89, 60),
    ("gated", 80, 4096),
    ("plain", 90, 4096),
    ("fp32", 80, 9),
]
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}  # a program at most, by compute capability


def test_moe_kernels_compile_and_fit(tmp_path: Path) -> None:
    """In a process of its own: whether kernels are interpreted is settled when their module is imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(minisgl.__file__).parent.parent)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout)
    assert len(built) == len(BUILDS) + 2
    for (_, capability, _), shared in zip(BUILDS, built, strict=False):
        assert 0 < shared <= SHARED_BYTES[capability]


def build(name: str, constants: dict[str, Any], options: dict[str, int], capability: int, element: str) -> int:
    """Compiles a kernel of triton_v1 as `run` would have it; returns the bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minisgl.kernels.moe import triton_v1

    function = getattr(triton_v1, name)
    types = dict.fromkeys(("x", "logits", "matrices", "out", "parts"), f"*{element}")
    types |= {"weights": "*fp32", "counts": "*i32", "order": "*i32"} | dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    aligned = [n for n in names if n in ("x", "x_stride", "matrices", "out", "width", "depth", "parts", "weights")]
    source = ASTSource(
        fn=function,
        signature={n: types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return int(compiled.metadata.shared)


def build_all() -> list[int]:
    from minisgl.kernels.moe.triton_v1 import choose_tile

    sizes = []
    for kind, capability, per_expert in BUILDS:
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        tile, pdl = choose_tile(per_expert, 1, dtype), capability >= 90
        constants = {"SHARED": 8, "GATED": kind == "gated", "EXPERTS": 128, "E_PAD": 128, "PDL": pdl}
        constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        sizes.append(build("_product", constants, options, capability, "fp32" if kind == "fp32" else "bf16"))
    route = {"TOP_K": 8, "K_PAD": 8, "EXPERTS": 128, "E_PAD": 128, "NORMALISE": True, "PDL": True}
    sizes.append(build("_route", route, {"num_warps": 1}, 90, "bf16"))
    sizes.append(build("_sum", {"TOP_K": 8, "BLOCK": 1024, "ADD": True, "PDL": True}, {"num_warps": 4}, 90, "bf16"))
    return sizes


# -- on a GPU ---------------------------------------------------------------------------------------------------------

LARGE = (
    *SMALL,
    Shape(1, 128, 8, 2048, 768),
    Shape(32, 128, 8, 2048, 768),
    Shape(256, 128, 8, 2048, 768, spread="one"),
    Shape(500, 60, 4, 1024, 704, normalise=False),
    Shape(3000, 16, 2, 512, 640),
)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_moe_equals_reference(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, dtype, moe)
    check(shape, dtype, moe, add=True)


@pytest.mark.cuda
def test_moe_in_a_graph_follows_its_inputs() -> None:
    """Routing changes between replays; a second run of the same gives the same bits."""
    args = arguments(Shape(19, 32, 4, 256, 128), torch.bfloat16)
    x, logits, _, _, out, *_ = args
    moe(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe(*args)
    for seed in range(20):
        fresh = arguments(Shape(19, 32, 4, 256, 128, spread=("even", "one")[seed % 2]), torch.bfloat16, seed)
        x.copy_(fresh[0])
        logits.copy_(fresh[1])
        out.fill_(torch.nan)
        graph.replay()
        want = expected(*args)
        assert float((out.double() - want).norm() / want.norm()) < TOLERANCE[torch.bfloat16]
        once = out.clone()
        graph.replay()
        assert torch.equal(once, out)


@pytest.mark.cuda
def test_moe_asks_the_host_nothing() -> None:
    args = arguments(LARGE[-1], torch.bfloat16)
    moe(*args)
    torch.cuda.synchronize()
    with mock.patch.object(torch.Tensor, "tolist", side_effect=AssertionError):
        torch.cuda.set_sync_debug_mode("error")
        try:
            moe(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    print(json.dumps(build_all()))
