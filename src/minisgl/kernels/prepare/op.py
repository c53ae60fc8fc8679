"""prepare: the inputs of a decode step, from what the device knows of running requests, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -1  # the place of a page that wasn't gained


class RowTables(NamedTuple):
    """State of running requests, a row each; the last row is a dummy that stays as it is. See `DeviceRows`."""

    page_table: Tensor  # [N + 1, P] int32
    lengths: Tensor  # [N + 1] int32
    last_token: Tensor  # [N + 1] int32
    params: Tensor  # [N + 1, 8] int32


class DecodeInputs(NamedTuple):
    """What the model and the sampler need of R requests that decode."""

    ids: Tensor  # [R] int32
    positions: Tensor  # [R] int32
    lens: Tensor  # [R] int32: positions + 1
    slots: Tensor  # [R] int64
    params: Tensor  # [R, 8] int32
    output_index: Tensor  # [R] int32

    @staticmethod
    def empty(size: int, device: torch.device) -> DecodeInputs:
        ids, positions, lens, index = torch.zeros(4, size, dtype=torch.int32, device=device)
        slots = torch.zeros(size, dtype=torch.int64, device=device)
        return DecodeInputs(ids, positions, lens, slots, torch.zeros(size, 8, dtype=torch.int32, device=device), index)


def prepare(words: Tensor, state: RowTables, page_size: int, out: DecodeInputs) -> None:
    """Enters pages that rows gained, writes `out`, and counts the token that the step computes in `lengths`.

    Args:
        words: [3, R] int32, contiguous: rows, no row twice but the dummy; the place in its table of the page that each
            gained, NEVER if it did not; that page.
    """
    if words.is_cuda:
        from minisgl.kernels.prepare import triton_v1

        triton_v1.run(words, state, page_size, out)
    else:
        reference(words, state, page_size, out)


def reference(words: Tensor, state: RowTables, page_size: int, out: DecodeInputs) -> None:
    rows, places, pages = words.long().unbind()
    dummy = state.lengths.shape[0] - 1
    gained = places != NEVER
    pages = torch.where(gained, pages, state.page_table[dummy, 0]).to(torch.int32)
    state.page_table[torch.where(gained, rows, dummy), torch.where(gained, places, 0)] = pages
    out.positions.copy_(state.lengths[rows])
    torch.add(out.positions, 1, out=out.lens)
    at = (out.positions // page_size).long()
    out.slots.copy_(state.page_table[rows, at].long() * page_size + out.positions % page_size)
    out.ids.copy_(state.last_token[rows])
    out.params.copy_(state.params[rows])
    torch.sub(out.lens, out.params[:, 6], out=out.output_index)
    state.lengths[rows] = torch.where(rows == dummy, 0, out.lens)
