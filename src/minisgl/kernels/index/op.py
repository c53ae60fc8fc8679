"""index: out[t] = table[ids[t] - vocab_start], the embedding lookup; rows of zeros for ids of other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import ID_CTYPES, Build, prepare
from minisgl.kernels.spec import FLOATS, KernelSpec, Run, Shape, Version, by_layout, launcher, nothing, register
from minisgl.kernels.tuning import Config
from minisgl.types import KernelError


def index(
    out: Tensor,
    table: Tensor,
    ids: Tensor,
    vocab_start: int = 0,
    vocab_len: int | None = None,
    *,
    version: str | None = None,
    config: Config | None = None,
) -> None:
    """Copies rows of `table` to `out`: row t is the one of `ids[t] - vocab_start`, or zeros if that is out of range.

    Args:
        out: [T, W], any dtype; rows contiguous, but they may lie apart from one another.
        table: [V, W], out's dtype, likewise.
        ids: [T] int32 or int64, contiguous.
        vocab_start: the id of the table's first row (under tensor parallelism each rank holds a range of ids).
        vocab_len: ids served, at most V; None is V.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    _plan((out, table, ids), vocab_len, version, config)(out, table, ids, vocab_start)


@by_layout
def _plan(
    tensors: tuple[Tensor, Tensor, Tensor], vocab_len: int | None, version: str | None, config: Config | None
) -> Run:
    out, table, ids = tensors
    tokens, length = _check(out, table, ids, vocab_len)
    device = check.cuda(out=out, table=table, ids=ids)
    if not out.numel():
        return nothing
    size = out.element_size()
    out_stride, table_stride, row_bytes = out.stride(0) * size, table.stride(0) * size, out.shape[1] * size
    vec = check.vector_bytes(out.data_ptr(), table.data_ptr(), out_stride, table_stride, row_bytes)
    start = launcher("index", device, out.dtype, version, config, tokens, out.shape[1], vec, ids.element_size())

    def run(out: Tensor, table: Tensor, ids: Tensor, first: int) -> None:
        start(out.data_ptr(), out_stride, table.data_ptr(), table_stride, ids.data_ptr(), first, length, tokens)

    return run


def _check(out: Tensor, table: Tensor, ids: Tensor, vocab_len: int | None) -> tuple[int, int]:
    check.dims("table", table, 2, "[V, W]")
    check.dims("ids", ids, 1, "[T]")
    check.dtype("ids", ids, check.IDS)
    check.contiguous("ids", ids)
    check.rows("table", table)
    tokens = ids.shape[0]
    check.shape("out", out, (tokens, table.shape[1]))
    check.dtype("out", out, (table.dtype,))
    check.rows("out", out)
    length = table.shape[0] if vocab_len is None else vocab_len
    if not 0 <= length <= table.shape[0]:
        raise KernelError(f"vocab_len is {vocab_len}; expected 0 to {table.shape[0]}, the rows of table")
    return tokens, length


def _build(version: str, row_bytes: int, vec: int, id_bytes: int, **macros: int) -> Build:
    macros |= {"ROW_BYTES": row_bytes, "VEC": vec}
    return Build.of(f"index/index_{version}.cu", f"index_{version}", ID_T=ID_CTYPES[id_bytes], **macros)


def _v1(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = shape["width"] * dtype.itemsize
    splits = next(n for n in (4, 2, 1) if n == 1 or row_bytes % (512 * n) == 0)
    build = _build("v1", row_bytes, shape["vec"], shape["id_bytes"], SPLITS=splits)
    return prepare(build, device, check.num_blocks(shape["tokens"] * splits * 32, 128), 128, pdl=False)


def _v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = shape["width"] * dtype.itemsize
    lanes, work, pieces = check.split_row(row_bytes // shape["vec"], config.work)
    build = _build("v2", row_bytes, shape["vec"], shape["id_bytes"], LANES=lanes, WORK=work)
    blocks = check.num_blocks(shape["tokens"] * pieces * lanes, config.threads)
    return prepare(build, device, blocks, config.threads, config.pdl)


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
    tokens, width, vocab, pad = shape["tokens"], shape["width"], shape["vocab"], shape.get("pad", 0)
    table = torch.randn(vocab, width + pad, dtype=dtype, device=device, generator=generator)[:, :width]
    ids = torch.randint(0, vocab, (copies, tokens), device=device, generator=generator)
    ids = ids.to(torch.int64 if shape.get("id_bytes") == 8 else torch.int32)
    out = torch.empty(copies, tokens, width + pad, dtype=dtype, device=device)[..., :width]
    local = (shape["start"], shape["length"]) if "length" in shape else ()
    return [(out[i], table[: shape.get("length", vocab)], ids[i], *local) for i in range(copies)]


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return shape["tokens"] * (2 * shape["width"] * dtype.itemsize + shape.get("id_bytes", 4)), 0


_QWEN = {"width": 4096, "vocab": 151_936}
SPEC = register(
    KernelSpec(
        name="index",
        run=index,
        reference=_reference,
        library=_library,
        versions=(
            Version("v2", "cuda", lambda *_: None, _v2, (_build("v2", 8192, 16, 4, LANES=32, WORK=4),)),
            Version("v1", "cuda", lambda *_: None, _v1, (_build("v1", 8192, 16, 4, SPLITS=4),)),
        ),
        sizes=("tokens", "width", "vec", "id_bytes"),
        inputs=_inputs,
        outputs=(0,),
        updated=(),
        cost=_cost,
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
    )
)
