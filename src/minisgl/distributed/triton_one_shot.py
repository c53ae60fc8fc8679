"""Small all-reduces in one trip over the links: every rank writes its numbers to all others, and nobody asks for any.

Each word of numbers travels with the number of the call beside it, in one store of eight bytes (NCCL's LL protocol).
Who waits looks at his own memory until every word of that call is there: no barrier, before or after. There are slots
for two turns: a rank that writes call n + 2 has had all words of call n + 1, so their senders had ended call n, whose
slots it overwrites. That holds for each block by itself, and each block counts its own calls.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.distributed.paths import MOST_ONE_SHOT

NUM_SLOTS = 2 * MOST_ONE_SHOT // 4  # that a rank has for each rank to write to: int64, zero at first
BLOCK = 512  # words of four bytes


@triton.jit(do_not_specialize=["rank", "count"])
def _one_shot(
    x, slots, calls, stop, rank, count, ROOM: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr
):
    """x: [count] int32, the bits of the numbers. slots: [SIZE] addresses of each rank's [2, SIZE, ROOM] int64."""
    block = tl.program_id(0)
    there = tl.load(slots + tl.arange(0, SIZE)).to(tl.pointer_type(tl.int64))
    here = tl.load(slots + rank).to(tl.pointer_type(tl.int64))
    call = tl.load(calls + block) + 1
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = (at < count)[None, :]
    word = (call.to(tl.int64) << 32) | (tl.load(x + at, at < count, 0).to(tl.int64) & 0xFFFFFFFF)
    at_turn = (call & 1) * SIZE * ROOM + at
    tl.store(there[:, None] + (rank * ROOM + at_turn)[None, :], word[None, :], inside)
    place = here + tl.arange(0, SIZE)[:, None] * ROOM + at_turn[None, :]
    found, late = tl.zeros([SIZE, BLOCK], tl.int64), 1
    while late > 0:
        ended = tl.load(stop, volatile=True)
        found = tl.load(place, inside, 0, volatile=True)
        late = tl.max(tl.max(((found >> 32 != call) & inside).to(tl.int32), 0), 0) - ended
    bits = found.to(tl.int32)
    if BF16:
        low = tl.sum((bits << 16).to(tl.float32, bitcast=True), 0).to(tl.bfloat16).to(tl.int16, bitcast=True)
        high = tl.sum((bits & -65536).to(tl.float32, bitcast=True), 0).to(tl.bfloat16).to(tl.int16, bitcast=True)
        total = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    else:
        total = tl.sum(bits.to(tl.float32, bitcast=True), 0).to(tl.int32, bitcast=True)
    tl.store(x + at, total, at < count)
    tl.store(calls + block, call)


class OneShot:
    """The sum over the ranks, in place, of up to MOST_ONE_SHOT bytes of float32 or bfloat16.

    addresses: of every rank's slots, as this one reaches them. The number of ranks must be a power of two.
    """

    def __init__(self, addresses: list[int], rank: int, device: torch.device) -> None:
        self.rank, self.slots = rank, torch.tensor(addresses, dtype=torch.int64, device=device)
        self.calls = torch.zeros(MOST_ONE_SHOT // 4 // BLOCK, dtype=torch.int32, device=device)
        self.stop = torch.zeros(1, dtype=torch.int32, device=device)  # 1: what waits for others ends

    def __call__(self, x: torch.Tensor) -> None:
        bits, own = x.view(-1).view(torch.int32), (self.slots, self.calls, self.stop, self.rank)
        _one_shot[(triton.cdiv(len(bits), BLOCK),)](
            bits, *own, len(bits), MOST_ONE_SHOT // 4, len(self.slots), BLOCK, x.dtype == torch.bfloat16
        )
