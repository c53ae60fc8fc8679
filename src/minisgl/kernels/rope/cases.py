"""rope in the laboratory: its reference, what it is tested and measured with, and its versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.rope.ladder import SIZES, VERSIONS, build_for, cost, rope
from minisgl.kernels.spec import KernelSpec, Shape, register
from minisgl.kernels.tuning import Config


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding (Su et al., 2021) of x [T, H, D], in x's own precision."""
    cos, sin = cos_sin[positions.long()].to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _reference(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    q.copy_(rotate(q, cos_sin, positions))
    k.copy_(rotate(k, cos_sin, positions))


def random_angles(shape: Shape, device: torch.device, generator: torch.Generator, copies: int) -> tuple[Tensor, Tensor]:
    """A table of cosines and sines [max_position, D], and positions [copies, T]."""
    dim, limit = shape["head_dim"], shape.get("max_position", 4096)
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(limit, device=device)[:, None] * frequencies
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).float().contiguous()
    shape_ = (copies, shape["tokens"])
    return cos_sin, torch.randint(0, limit, shape_, device=device, generator=generator, dtype=torch.int32)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    tokens, heads, kv_heads, dim = (shape[n] for n in ("tokens", "heads", "kv_heads", "head_dim"))
    size = (copies, tokens, heads + 2 * kv_heads, dim)  # q and k are slices of a fused product's rows
    rows = torch.randn(size, dtype=dtype, device=device, generator=generator)
    cos_sin, positions = random_angles(shape, device, generator, copies)
    q, k = rows[:, :, :heads], rows[:, :, heads : heads + kv_heads]
    return [(q[i], k[i], cos_sin, positions[i]) for i in range(copies)]


def _case(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Shape:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


SPEC = register(
    KernelSpec(
        name="rope",
        run=rope,
        reference=_reference,
        library=_reference,
        versions=VERSIONS,
        sizes=SIZES,
        inputs=_inputs,
        outputs=(),
        updated=(0, 1),
        cost=cost,
        tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
        cases=tuple(
            _case(*sizes)
            for sizes in ((1, 16, 8, 128), (37, 9, 3, 64), (6, 5, 1, 80), (19, 7, 7, 96), (3, 3, 3, 256), (0, 2, 1, 64))
        ),
        bench=tuple(_case(n, 16, 8, 128) for n in (1, 64, 256, 1024, 4096, 16384)),
        tunable=tuple(_case(4**n, 16, 8, 128) for n in range(8)),
        configs=tuple(Config(threads, work) for threads in (64, 128, 256) for work in (1, 2, 4)),
        builds=(
            build_for(torch.bfloat16, 16, 8, 128, 1),
            build_for(torch.float32, 9, 3, 64, 2),
            build_for(torch.float16, 4, 4, 80, 4),
        ),
    )
)
