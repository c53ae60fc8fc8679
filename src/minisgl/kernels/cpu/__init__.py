"""The CPU kernels of csrc/cpu as torch tensors meet them: float32 activations, weights packed in compact formats.

Without the C++ extension there are none of them (`available`), and PyTorch's operators serve.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from minisgl.types import ConfigError

if TYPE_CHECKING:
    from minisgl import _C as native
else:
    try:
        from minisgl import _C as native
    except ImportError:
        native = None

__all__ = [
    "GGUF_FORMATS",
    "PackedMatrix",
    "PackedRows",
    "address",
    "available",
    "choose_kernels",
    "native",
    "paged_attention",
    "pages",
    "sample_tokens",
]

GGUF_FORMATS: Final = ("Q8_0", "Q4_0", "Q4_1")  # block types that are packed as they are
KERNELS_VARIABLE: Final = "MINISGL_CPU_KERNELS"
_PLAIN: Final = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def available() -> bool:
    """Whether the C++ extension is there."""
    return native is not None


def choose_kernels() -> None:
    """Takes the kernels for the instruction set that $MINISGL_CPU_KERNELS names instead of the best.

    Raises:
        ConfigError: this processor can't run those.
    """
    wanted, choice = os.environ.get(KERNELS_VARIABLE), native.cpu_available_kernels()
    if wanted and wanted not in choice:
        raise ConfigError(f"{KERNELS_VARIABLE} is {wanted!r}; this processor can run: {', '.join(choice)}")
    native.cpu_select_kernels(wanted or choice[0])


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pages(page_table: Tensor, seq_lens: Tensor, query_starts: Tensor, page_size: int) -> native.Pages:
    """A step's paging as the extension takes it, while the tensors live; see `attention.base.ForwardBatch`."""
    assert page_table.dtype == seq_lens.dtype == query_starts.dtype == torch.int32 and page_table.stride(-1) == 1
    tables = page_table.data_ptr(), seq_lens.data_ptr(), query_starts.data_ptr()
    return *tables, page_table.shape[0], page_table.stride(0), page_size


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, seq_lens: Tensor, query_starts: Tensor, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Causal attention of a step's queries, all sequences in one call.

    Args:
        q: [T, num_heads, head_dim] float32.
        keys, values: [pages, page_size, num_kv_heads, head_dim] float32, contiguous: one layer of the pool.
        page_table, seq_lens, query_starts, scale, window: as in `attention.base`.

    Returns:
        [T, num_heads, head_dim] float32, contiguous.
    """
    heads, head_dim = q.shape[1:]
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    out = q.new_empty(q.shape)
    paging = pages(page_table, seq_lens, query_starts, keys.shape[1])
    pool = keys.data_ptr(), values.data_ptr()
    sizes = heads, keys.shape[2], head_dim
    native.cpu_paged_attention(q.data_ptr(), q.stride(0), out.data_ptr(), *pool, paging, *sizes, scale, window or 0)
    return out


def sample_tokens(
    logits: Tensor, temperature: Tensor, seeds: Tensor, output_index: Tensor, first: int = 0,
    best: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A token a row [R] int64, the most likely at temperature 0, else drawn with `sample.noise.gumbel_noise`.

    Args:
        logits: [R, V] float32. temperature: [R] float32. seeds: [R] int64. output_index: [R] integers.
        first: the id of the first logit, a multiple of 4. best: [R] float32, gets what each token was chosen by.
    """
    rows, vocab_size = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    temperature, seeds, output_index = temperature.contiguous(), seeds.contiguous(), output_index.int().contiguous()
    out = torch.empty(rows, dtype=torch.int64)
    params = temperature.data_ptr(), seeds.data_ptr(), output_index.data_ptr()
    native.cpu_sample(
        logits.data_ptr(), logits.stride(0), rows, vocab_size, *params, first, out.data_ptr(), address(best)
    )
    return out


class PackedMatrix:
    """A weight [rows, columns] that the loaders fill, as they fill a parameter, through slices of its rows.

    Each slice is kept in the narrowest format that holds it exactly: float32, float16, bfloat16, or the blocks of a
    GGUF file. In a product it counts as float32.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        self.native = native.PackedWeight(columns)

    def __getitem__(self, rows: slice) -> PackedRows:
        first, last, _ = rows.indices(self.shape[0])
        return PackedRows(self, first, last - first)

    @property
    def nbytes(self) -> int:
        return self.native.num_bytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [T, columns] float32 → `x` · Wᵀ + bias, [T, rows]."""
        if x.shape[1] != self.native.padded_columns:
            x = torch.nn.functional.pad(x, (0, self.native.padded_columns - x.shape[1]))
        x = x if x.stride(1) == 1 else x.contiguous()
        out = x.new_empty(x.shape[0], self.shape[0])
        self.native.multiply(x.data_ptr(), x.stride(0), x.shape[0], address(bias), out.data_ptr(), self.shape[0])
        return out

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T], int32 and in range → [T, columns] float32."""
        out = torch.empty(ids.shape[0], self.shape[1])
        self.native.gather(ids.data_ptr(), ids.shape[0], out.data_ptr(), self.shape[1])
        return out


class PackedRows:
    """Some rows of a `PackedMatrix`: what a loader fills, once. It stands for a float32 tensor on the CPU."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, matrix: PackedMatrix, first: int, count: int) -> None:
        self.matrix, self.first = matrix, first
        self.shape = torch.Size((count, matrix.shape[1]))
        self.nbytes = 4 * self.shape.numel()

    def copy_(self, values: Tensor) -> None:
        """Packs `values`, of any floating dtype and the shape of this."""
        for dtype in (torch.bfloat16, torch.float16):
            if values.dtype == torch.float32 and torch.equal(values.to(dtype).float(), values):
                values = values.to(dtype)
        self.put(_PLAIN[values.dtype], values)

    def put(self, format: str, rows: Tensor) -> None:
        """Packs rows in `format`: values, or the bytes [rows, …] of GGUF's blocks."""
        rows = rows.contiguous()
        self.matrix.native.put(format, rows.data_ptr(), rows.nbytes, self.first, self.shape[0])
