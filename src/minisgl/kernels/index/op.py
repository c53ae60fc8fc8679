"""index: out[t] = table[ids[t] - vocab_start], the embedding lookup; rows of zeros for ids of other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import ID_CTYPES, Build, prepare
from minisgl.kernels.spec import Kernel, Run, Shape, Version, by_layout, fits, launcher, nothing, register
from minisgl.kernels.tuning import Config
from minisgl.types import KernelError


def index(
    out: Tensor, table: Tensor, ids: Tensor, vocab_start: int = 0, vocab_len: int | None = None, *,
    version: str | None = None, config: Config | None = None,
) -> None:  # fmt: skip
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


def build_for(version: str, row_bytes: int, vec: int, id_bytes: int, **macros: int) -> Build:
    """The build of the source of `version`, which lies in the ladder unless it is the one that the engine runs."""
    macros |= {"ROW_BYTES": row_bytes, "VEC": vec}
    source = f"index/{'' if version == 'v2' else 'ladder/'}index_{version}.cu"
    return Build.of(source, f"index_{version}", ID_T=ID_CTYPES[id_bytes], **macros)


def _v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = shape["width"] * dtype.itemsize
    lanes, work, pieces = check.split_row(row_bytes // shape["vec"], config.work)
    build = build_for("v2", row_bytes, shape["vec"], shape["id_bytes"], LANES=lanes, WORK=work)
    blocks = check.num_blocks(shape["tokens"] * pieces * lanes, config.threads)
    return prepare(build, device, blocks, config.threads, config.pdl)


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return shape["tokens"] * (2 * shape["width"] * dtype.itemsize + shape.get("id_bytes", 4)), 0


KERNEL = register(Kernel("index", (Version("v2", "cuda", fits, _v2),), ("tokens", "width", "vec", "id_bytes"), _cost))
