"""The inputs of a decode step: the kernel against its reference, and the reference against plain loops."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minisgl.kernels.prepare.op import NEVER, DecodeInputs, RowTables, prepare, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _case(count: int, page_size: int, num_rows: int, seed: int) -> tuple[Tensor, RowTables]:
    """A step of `count` requests, some of which begin a page; a few entries of padding."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    pages = 12
    tables = RowTables(
        torch.randint(0, 10_000, (num_rows + 1, pages), generator=generator, dtype=torch.int32)[:, : pages - 1],
        torch.randint(0, (pages - 1) * page_size, (num_rows + 1,), generator=generator, dtype=torch.int32),
        torch.randint(0, 150_000, (num_rows + 1,), generator=generator, dtype=torch.int32),
        torch.randint(0, 2**31 - 1, (num_rows + 1, 8), generator=generator, dtype=torch.int32),
    )
    tables.lengths[num_rows] = 0
    words = torch.full((3, count + 3), NEVER, dtype=torch.int32)
    words[0] = num_rows
    words[0, :count] = torch.tensor(rng.sample(range(num_rows), count))
    for i, row in enumerate(words[0, :count].tolist()):
        place, offset = divmod(int(tables.lengths[row]), page_size)
        if offset == 0:
            words[1, i], words[2, i] = place, rng.randrange(10_000)
    return words.to(DEVICE), RowTables(*(x.to(DEVICE) for x in tables))


def _run(
    call: Callable[[Tensor, RowTables, int, DecodeInputs], None], words: Tensor, tables: RowTables, page_size: int
) -> tuple[RowTables, DecodeInputs]:
    after = RowTables(*(x.clone() for x in tables))
    out = DecodeInputs.empty(words.shape[1], words.device)
    for x in out:
        x.fill_(-77)
    call(words, after, page_size, out)
    return after, out


def _triton(words: Tensor, tables: RowTables, page_size: int, out: DecodeInputs) -> None:
    pytest.importorskip("triton")
    from minisgl.kernels.prepare import triton_v1

    triton_v1.run(words, tables, page_size, out)


CASES = pytest.mark.parametrize(
    ("count", "page_size"), [(1, 16), (3, 1), (64, 4), (65, 16), (200, 48)], ids=lambda x: str(x)
)


def _check_kernel(count: int, page_size: int) -> None:
    for seed in range(3):
        words, tables = _case(count, page_size, 260, seed)
        expected, got = (_run(call, words, tables, page_size) for call in (reference, _triton))
        for part, other in zip(expected, got, strict=True):
            for name, x, y in zip(part._fields, part, other, strict=True):
                assert torch.equal(x, y), name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tests marked cuda do the same")
@CASES
def test_prepare_interpreted_equals_reference(count: int, page_size: int) -> None:
    _check_kernel(count, page_size)


@pytest.mark.cuda
@CASES
def test_prepare_equals_reference(count: int, page_size: int) -> None:
    _check_kernel(count, page_size)


def test_prepare_by_hand() -> None:
    """Row 1 is at position 7 of pages of 4, row 0 begins its second page; the rest is padding."""
    tables = RowTables(
        torch.tensor([[5, 9], [3, 8], [6, 6]], dtype=torch.int32, device=DEVICE),
        torch.tensor([4, 7, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([11, 22, 33], dtype=torch.int32, device=DEVICE),
        torch.arange(24, dtype=torch.int32, device=DEVICE).view(3, 8) // 8,
    )
    words = torch.tensor([[1, 0, 2, 2], [NEVER, 1, NEVER, NEVER], [0, 2, 0, 0]], dtype=torch.int32, device=DEVICE)
    out = DecodeInputs.empty(4, DEVICE)
    prepare(words, tables, 4, out)
    assert out.ids.tolist() == [22, 11, 33, 33]
    assert out.positions.tolist() == [7, 4, 0, 0] and out.lens.tolist() == [8, 5, 1, 1]
    assert out.slots.tolist() == [8 * 4 + 3, 2 * 4, 24, 24]
    assert out.params[:, 0].tolist() == [1, 0, 2, 2] and out.output_index.tolist() == [7, 5, -1, -1]
    assert tables.page_table.tolist() == [[5, 2], [3, 8], [6, 6]] and tables.lengths.tolist() == [5, 8, 0]
