"""index in the laboratory: its reference, what it is tested and measured with, and its older versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels.index.ladder import VERSIONS
from minisgl.kernels.index.op import KERNEL, build_for, index
from minisgl.kernels.spec import FLOATS, KernelSpec, Shape, register
from minisgl.kernels.tuning import Config


def _reference(out: Tensor, table: Tensor, ids: Tensor, vocab_start: int = 0, vocab_len: int | None = None) -> None:
    length = table.shape[0] if vocab_len is None else vocab_len
    local = ids.long() - vocab_start
    known = (local >= 0) & (local < length)
    out.zero_()
    out[known] = table[local[known]]


def _library(out: Tensor, table: Tensor, ids: Tensor, *_: Any) -> None:
    torch.index_select(table, 0, ids, out=out)


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    """Random ids of a vocabulary, or of its first `distinct`, so that rows repeat."""
    tokens, width, vocab, pad = shape["tokens"], shape["width"], shape["vocab"], shape.get("pad", 0)
    table = torch.randn(vocab, width + pad, dtype=dtype, device=device, generator=generator)[:, :width]
    ids = torch.randint(0, shape.get("distinct", vocab), (copies, tokens), device=device, generator=generator)
    ids = ids.to(torch.int64 if shape.get("id_bytes") == 8 else torch.int32)
    out = torch.empty(copies, tokens, width + pad, dtype=dtype, device=device)[..., :width]
    local = (shape["start"], shape["length"]) if "length" in shape else ()
    return [(out[i], table[: shape.get("length", vocab)], ids[i], *local) for i in range(copies)]


_QWEN = {"width": 4096, "vocab": 151_936}
SPEC = register(
    KernelSpec(
        name=KERNEL.name,
        run=index,
        reference=_reference,
        library=_library,
        versions=(*KERNEL.versions, *VERSIONS),
        sizes=KERNEL.sizes,
        inputs=_inputs,
        outputs=(0,),
        updated=(),
        cost=KERNEL.cost,
        tolerance=dict.fromkeys(FLOATS, 0.0),
        cases=(
            {"tokens": 1, "width": 4096, "vocab": 100},
            {"tokens": 67, "width": 576, "vocab": 300, "id_bytes": 8},
            {"tokens": 3, "width": 40, "vocab": 7, "pad": 8},
            {"tokens": 5, "width": 33, "vocab": 9, "id_bytes": 8},
            {"tokens": 129, "width": 2, "vocab": 50, "pad": 1},
            {"tokens": 300, "width": 1024, "vocab": 400, "start": 100, "length": 50},
            {"tokens": 0, "width": 64, "vocab": 3},
        ),
        bench=tuple({"tokens": n, **_QWEN} for n in (1, 64, 256, 1024, 4096, 16384)),
        tunable=tuple({"tokens": 4**n, **_QWEN} for n in range(8)),
        configs=tuple(Config(threads, work) for threads in (64, 128, 256) for work in (1, 2, 4, 8)),
        builds=(build_for("v2", 8192, 16, 4, LANES=32, WORK=4),),
    )
)
