"""The inputs of any step, whatever mix of decodes and chunks of prompts: exact, or padded to the shape of a graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.engine.scheduler import ScheduledBatch
from minisgl.engine.state import DeviceRows

IN_FLIGHT = -1  # in place of a token id: read the row's last token


class StepShape(NamedTuple):
    """What a step has room for. Its first sequences are `decodes`, of a token each; the others have the rest."""

    tokens: int
    decodes: int
    seqs: int


class StepInputs(NamedTuple):
    """T tokens of S sequences, all int32: arrays on the host, or tensors on the device."""

    ids: Any  # [T], or IN_FLIGHT
    positions: Any  # [T]
    token_rows: Any  # [T]: each token's row of `DeviceRows`
    rows: Any  # [S]
    lens: Any  # [S]: tokens up to and including this step's
    starts: Any  # [S + 1]: prefix sums of the sequences' tokens in this step


def lay_out(batch: ScheduledBatch, shape: StepShape, dummy: int, width: int) -> tuple[StepInputs, np.ndarray]:
    """The batch in a shape that has room for it, and the number of each request's sequence.

    Missing decodes become dummies of a token, missing tokens dummy sequences of `width` at most; what is left of the
    sequences is empty. All of them have the row `dummy`, so that they read and write the pool's dummy page.
    """
    n, places = batch.num_decodes, np.arange(len(batch.requests))
    places[n:] += shape.decodes - n
    rows, (begin, counts) = np.full(shape.seqs, dummy, np.int32), np.zeros((2, shape.seqs), np.int32)
    counts[n : shape.decodes] = 1
    rows[places], begin[places], counts[places] = [r.row for r in batch.requests], batch.starts, batch.counts
    missing = shape.tokens - int(counts.sum())
    for place in range(shape.decodes + len(places) - n, shape.seqs):
        counts[place] = min(missing, width)
        missing -= counts[place]
    assert missing == 0
    starts = np.zeros(shape.seqs + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    positions = np.arange(shape.tokens, dtype=np.int32) - np.repeat(starts[:-1] - begin, counts)
    ids = np.full(shape.tokens, IN_FLIGHT, np.int32)
    ways = zip(starts[places].tolist(), batch.requests, batch.starts, batch.counts, strict=True)
    for at, request, start, count in ways:
        if start < len(request.tokens):  # else a decode whose input the step before samples
            ids[at : at + count] = request.tokens[start : start + count]
    return StepInputs(ids, positions, np.repeat(rows, counts), rows, begin + counts, starts), places


def forward_batch(
    x: StepInputs, num_decodes: int, state: DeviceRows, pool: KVPool, attention: AttentionBackend, wanted: Tensor,
    host: StepInputs | None,
) -> ForwardBatch:  # fmt: skip
    """What the model needs, by nothing but work on the device; `lengths` of the rows are brought up to this step.

    Args:
        wanted: [R] rows of [T] whose hidden states are.
        host: the same as `x`; None: a graph captures this, so that attention is to find pages by the sequences' rows.
    """
    size, table, hosts = pool.page_size, state.page_table, 2 * (np.empty(0, np.int32),)
    token_rows, positions = x.token_rows.long(), x.positions.long()
    slots = table[token_rows, positions // size].long() * size + positions % size
    ids = torch.where(x.ids == IN_FLIGHT, state.last_token[token_rows], x.ids)
    state.lengths.index_copy_(0, x.rows.long(), x.lens)
    state.lengths[state.dummy :].zero_()
    if host is not None:
        table = table[:, : -(-int(host.lens.max()) // size)].index_select(0, x.rows)
        hosts = host.lens, np.diff(host.starts)
    found = x.rows if host is None else None
    sequences = table, x.lens, x.starts, wanted, num_decodes, *hosts
    batch = ForwardBatch(ids, x.positions, slots, *sequences, pool, attention, table_rows=found)
    attention.prepare(batch)
    return batch
