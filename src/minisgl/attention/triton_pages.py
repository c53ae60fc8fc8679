"""The pages of a step's sequences as one list, which libraries ask for where the project's own kernels read a table."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor


class PageList(NamedTuple):
    """Pages of S sequences, one after another: sequence i has `ids[starts[i] : starts[i + 1]]`. All int32."""

    starts: Tensor  # [S + 1]
    ids: Tensor  # [N], of which the first starts[S] count
    last_counts: Tensor  # [S]: tokens in the last page of each

    @staticmethod
    def empty(num_seqs: int, ids: Tensor) -> PageList:
        """A list to be written, over the memory of `ids`; `starts` is all zeros."""
        starts, last_counts = torch.zeros(2, num_seqs + 1, dtype=torch.int32, device=ids.device)
        return PageList(starts, ids, last_counts[:num_seqs])


def page_counts(lens: np.ndarray, page_size: int) -> tuple[Tensor, Tensor]:
    """`starts` and `last_counts` of sequences of `lens` [S] int32, on the host."""
    counts = -(-lens // page_size)
    starts = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return torch.from_numpy(starts), torch.from_numpy(lens - (counts - 1) * page_size)


@triton.jit
def _list_pages(table, stride, table_rows, lens, starts, ids, last_counts, PAGE: tl.constexpr):
    """Program i copies the pages of sequence i behind those of the sequences before it."""
    BLOCK: tl.constexpr = 256
    seq = tl.program_id(0)
    begin = 0
    for start in range(0, seq, BLOCK):
        i = start + tl.arange(0, BLOCK)
        begin += tl.sum(tl.cdiv(tl.load(lens + i, mask=i < seq, other=0), PAGE), 0)
    length = tl.load(lens + seq)
    count = tl.cdiv(length, PAGE)
    tl.store(starts + seq + 1, begin + count)
    tl.store(last_counts + seq, length - (count - 1) * PAGE)
    row = seq if table_rows is None else tl.load(table_rows + seq)
    table += row.to(tl.int64) * stride
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        pages = tl.load(table + i, mask=i < count, other=0)
        tl.store(ids + begin + i, pages, mask=i < count)


def list_pages(table: Tensor, table_rows: Tensor | None, lens: Tensor, page_size: int, out: PageList) -> None:
    """Writes `out` for the S sequences of `lens` [S] int32, each at least 1. It waits for nothing: graphs can hold it.

    Args:
        table: [rows, P] int32, whose rows may lie apart.
        table_rows: [S] int32, each sequence's row of the table; None: its own number.
    """
    _list_pages[lens.shape[0],](
        table, table.stride(0), table_rows, lens, out.starts, out.ids, out.last_counts, PAGE=page_size
    )
