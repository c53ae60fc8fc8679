"""The CPU kernels in the laboratory: a version is an instruction set that they were compiled for.

They serve float32. Without the C++ extension every version says so, and nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisgl.kernels import cpu
from minisgl.kernels.nvrtc import Capability
from minisgl.kernels.sample import cases as sample
from minisgl.kernels.spec import KernelSpec, Run, Shape, Version, register
from minisgl.kernels.tuning import Config

FORMATS = {32: "f32", 16: "bf16", 8: "q8_0", 4: "q4_1"}  # by bits of a weight
BLOCK_BYTES = {32: 128, 16: 64, 8: 34, 4: 20}  # of 32 weights
F32 = torch.float32


def _supports(name: str, where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    if not cpu.available():
        return "the C++ extension isn't installed"
    if name not in cpu.native.cpu_available_kernels():
        return f"this processor lacks {name}"
    return None if dtype == F32 else "the CPU kernels serve float32"


def _versions(run: Run) -> tuple[Version, ...]:
    """One an instruction set, the widest first."""

    def prepare(name: str, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
        return partial(run, version=name)

    sets = ("avx512", "avx2", "portable")
    return tuple(Version(name, "cpu", partial(_supports, name), partial(prepare, name)) for name in sets)


def _by_version(call: Callable[..., None]) -> Run:
    """`call` under the instruction set asked for; the one before is back when it returns."""

    def run(*args: Any, version: str | None = None, config: Config | None = None) -> None:
        if version is None:
            return call(*args)
        before = cpu.native.cpu_kernels()
        cpu.native.cpu_select_kernels(version)
        try:
            call(*args)
        finally:
            cpu.native.cpu_select_kernels(before)

    return run


# -- products with packed weights -------------------------------------------------------------------------------------


def _linear(matrix: cpu.PackedMatrix, x: Tensor, dense: Tensor, out: Tensor) -> None:
    """`dense` holds the weights that `matrix` stands for, for the reference alone."""
    out.copy_(matrix.linear(x))


def _linear_reference(matrix: cpu.PackedMatrix, x: Tensor, dense: Tensor, out: Tensor) -> None:
    torch.mm(x, dense.T, out=out)


def _pack(values: Tensor, bits: int) -> tuple[cpu.PackedMatrix, Tensor]:
    matrix = cpu.PackedMatrix(*values.shape)
    if bits >= 16:
        stored = values if bits == 32 else values.bfloat16()
        matrix[:].put(FORMATS[bits], stored)
        return matrix, stored.float()
    import gguf

    kind = gguf.GGMLQuantizationType[FORMATS[bits].upper()]
    blocks = gguf.quantize(values.numpy(), kind)
    matrix[:].put(FORMATS[bits], torch.from_numpy(blocks))
    return matrix, torch.from_numpy(gguf.dequantize(blocks, kind))


def _linear_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    size = (shape["rows"], shape["columns"])
    weights = [_pack(torch.randn(size, generator=generator), shape["bits"]) for _ in range(copies)]
    x = torch.randn(copies, shape["tokens"], shape["columns"], generator=generator)
    return [(m, x[i], dense, torch.empty(shape["tokens"], size[0])) for i, (m, dense) in enumerate(weights)]


def _linear_cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    weights, tokens = shape["rows"] * shape["columns"], shape["tokens"]
    moved = weights * BLOCK_BYTES[shape["bits"]] // 32 + 4 * tokens * (shape["rows"] + shape["columns"])
    return moved, 2 * tokens * weights


def _matrix(tokens: int, rows: int, columns: int, bits: int) -> Shape:
    return {"tokens": tokens, "rows": rows, "columns": columns, "bits": bits}


_LINEAR = _by_version(_linear)
LINEAR = register(
    KernelSpec(
        name="cpu_linear",
        run=_LINEAR,
        reference=_linear_reference,
        library=_linear_reference,
        versions=_versions(_LINEAR),
        sizes=("tokens", "rows", "columns", "bits"),
        inputs=_linear_inputs,
        outputs=(3,),
        updated=(),
        cost=_linear_cost,
        tolerance={F32: 2e-6},
        cases=tuple(_matrix(*s) for s in ((1, 96, 576, 4), (17, 33, 64, 8), (5, 7, 40, 16), (3, 65, 333, 32))),
        bench=tuple(_matrix(m, 3072, 576, bits) for bits in (4, 32) for m in (1, 16)),
    )
)


# -- attention over pages ---------------------------------------------------------------------------------------------


def _attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lens: Tensor, starts: Tensor, out: Tensor
) -> None:
    out.copy_(cpu.paged_attention(q, keys, values, table, lens, starts, q.shape[2] ** -0.5, None))


def _attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lens: Tensor, starts: Tensor, out: Tensor
) -> None:
    """Each sequence by itself, its scores written out."""
    group = q.shape[1] // keys.shape[2]
    for i, length in enumerate(lens.tolist()):
        first, last = int(starts[i]), int(starts[i + 1])
        k, v = (x[table[i].long()].flatten(0, 1)[:length].repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[first:last], k) * q.shape[2] ** -0.5
        position = torch.arange(length - (last - first), length)[:, None]
        scores.masked_fill_(torch.arange(length) > position, float("-inf"))
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def _attention_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    batch, queries, context, dim = (shape[n] for n in ("tokens", "queries", "context", "head_dim"))
    pages = -(-context // 16)
    found = []
    for _ in range(copies):
        keys, values = torch.randn(2, batch * pages, 16, shape["kv_heads"], dim, generator=generator)
        q = torch.randn(batch * queries, shape["heads"], dim, generator=generator)
        table = torch.randperm(batch * pages, generator=generator).int().view(batch, pages)
        lens = torch.full((batch,), context, dtype=torch.int32)
        starts = torch.arange(batch + 1, dtype=torch.int32) * queries
        found.append((q, keys, values, table, lens, starts, torch.empty_like(q)))
    return found


def _attention_cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    batch, queries, context = shape["tokens"], shape["queries"], shape["context"]
    moved = 2 * context * shape["kv_heads"] + 2 * queries * shape["heads"]
    pairs = queries * context - queries * (queries - 1) // 2
    return 4 * batch * moved * shape["head_dim"], 4 * batch * pairs * shape["heads"] * shape["head_dim"]


def _sequences(batch: int, queries: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Shape:
    sizes = {"tokens": batch, "queries": queries, "context": context}
    return {**sizes, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


_ATTENTION = _by_version(_attention)
ATTENTION = register(
    KernelSpec(
        name="cpu_attention",
        run=_ATTENTION,
        reference=_attention_reference,
        library=_attention_reference,
        versions=_versions(_ATTENTION),
        sizes=("tokens", "queries", "context", "heads", "kv_heads", "head_dim"),
        inputs=_attention_inputs,
        outputs=(6,),
        updated=(),
        cost=_attention_cost,
        tolerance={F32: 2e-5},
        cases=tuple(_sequences(*s) for s in ((1, 1, 40, 9, 3, 64), (3, 1, 17, 4, 4, 128), (2, 7, 50, 6, 1, 80))),
        bench=tuple(_sequences(*s) for s in ((1, 1, 512, 9, 3, 64), (16, 1, 512, 9, 3, 64), (1, 256, 256, 9, 3, 64))),
    )
)


# -- sampling ---------------------------------------------------------------------------------------------------------


def _sample(logits: Tensor, temperature: Tensor, seeds: Tensor, index: Tensor, out: Tensor) -> None:
    out.copy_(cpu.sample_tokens(logits, temperature, seeds, index))


_SAMPLE = _by_version(_sample)
SAMPLE = register(
    KernelSpec(
        name="cpu_sample",
        run=_SAMPLE,
        reference=sample.reference,
        library=sample.library,
        versions=_versions(_SAMPLE),
        sizes=("tokens", "vocab"),
        inputs=sample.inputs,
        outputs=(4,),
        updated=(),
        cost=sample.cost,
        tolerance={F32: 1e-4},
        cases=sample.CASES,
        bench=tuple({"tokens": n, "vocab": 49_152} for n in (1, 16)),
        error=sample.regret,
    )
)
