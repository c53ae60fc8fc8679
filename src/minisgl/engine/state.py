"""What the device knows of running requests, and the small copies that keep it up to date.

A request has a row for as long as it runs. A step sends only what changed; everything else, down to the token that
the step before sampled, is read from the rows, so that a step can be launched before the one before it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisgl.kernels.prepare.op import RowTables
from minisgl.types import Request

RING = 8  # slots of a mailbox, a power of two: of at most two steps the tokens may not have been read
ALIGN = 4  # words; so that every array of a transfer starts at 16 bytes


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """int32 arrays as tensors of the same shapes on `device`, in one transfer that the host doesn't wait for.

    On a CPU they share memory with the arrays.
    """
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    sizes = [-(-a.size // ALIGN) * ALIGN for a in arrays]
    words = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
    ends = np.cumsum(sizes)
    for end, size, a in zip(ends, sizes, arrays, strict=True):
        words.numpy()[end - size : end - size + a.size] = a.ravel()
    parts: Sequence[Tensor] = words.to(device, non_blocking=True).split(sizes)  # type: ignore[no-untyped-call]
    return [part[: a.size].view(a.shape) for part, a in zip(parts, arrays, strict=True)]


class Mailbox:
    """Pinned memory through which the host passes a graph its words and gets its tokens, with no copy of CUDA's.

    Steps take its slots in turn. A graph counts the turns on the device, so that the host can write the next step's
    words while the one before is still waiting; a slot comes up again RING steps later.

    Args:
        size: requests of a step at most. pad: [3, 1] int32, the words of one that isn't there.
    """

    def __init__(self, size: int, pad: np.ndarray, device: torch.device) -> None:
        pinned = device.type == "cuda"
        inbox = torch.zeros(RING, 3 * size, dtype=torch.int32, pin_memory=pinned)
        outbox = torch.zeros(RING, size, dtype=torch.int64, pin_memory=pinned)
        self._words, self._tokens, self._pad = inbox.numpy(), outbox, pad
        self._inbox, self._outbox = alias(inbox, device), alias(outbox, device)
        self._keep = inbox, outbox  # what aliases don't
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self._slot = 0
        self._done = [torch.cuda.Event() for _ in range(RING if pinned else 0)]  # type: ignore[no-untyped-call]

    def reset(self, size: int = 0) -> None:
        """The next step takes slot 1, which has words for `size` requests that aren't there. Nothing may be running."""
        if self._done:
            torch.cuda.synchronize()
        self._turn.zero_()
        self._slot = 0
        self._words[:, : 3 * size] = self._pad.repeat(size, axis=1).ravel()

    # -- on the device, captured

    def receive(self, words: Tensor) -> None:
        """Begins a turn: `words` [3, R] int32 are the host's."""
        self._turn.add_(1).bitwise_and_(RING - 1)
        torch.index_select(self._inbox[:, : words.numel()], 0, self._turn, out=words.view(1, -1))

    def send(self, tokens: Tensor) -> None:
        """Gives the host `tokens` [R] int64 of the turn."""
        self._outbox[:, : tokens.shape[0]].index_copy_(0, self._turn, tokens[None])

    # -- on the host

    def next_words(self, size: int) -> np.ndarray:
        """The words [3, `size`] of the next step, to be filled. Its turn comes with `tokens`, once it is launched."""
        slot = (self._slot + 1) % RING
        if self._done:
            self._done[slot].synchronize()  # RING steps ago: long done
        words = self._words[slot, : 3 * size].reshape(3, size)
        words[:] = self._pad
        return words

    def tokens(self, count: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Where the tokens [`count`] of the step just launched will be, and the event after which they are there."""
        self._slot = (self._slot + 1) % RING
        if not self._done:
            return self._tokens[self._slot, :count], None
        done = self._done[self._slot]
        done.record()
        return self._tokens[self._slot, :count], done


def alias(x: Tensor, device: torch.device) -> Tensor:
    """The memory of `x`, which lies on `device` or is pinned, as the device sees it and without holding it."""
    if device.type == "cpu":
        return x
    words = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<i8"}[x.element_size()]

    class View:
        __cuda_array_interface__ = {
            "data": (x.data_ptr(), False), "shape": tuple(x.shape), "typestr": words, "version": 3,
            "strides": tuple(s * x.element_size() for s in x.stride()),
        }  # fmt: skip

    return torch.as_tensor(View(), device=device).view(x.dtype)


class Past(NamedTuple):
    """What penalties depend on. tokens: [R, L] int32, at their positions, anything beyond a request's last.

    penalties: [R, 3] float32: repetition (1: none), frequency, presence.
    """

    tokens: Tensor
    penalties: Tensor


class DeviceRows:
    """State of running requests, a row each. The last row is a dummy: padding points to it.

    page_table: [rows + 1, P] int32, the dummy's entries naming the pool's dummy page.
    lengths: [rows + 1] int32, tokens computed. last_token: [rows + 1] int32, sampled last.
    params: [rows + 1, 8] int32 words: temperature, top_p, min_p (float32), top_k, seed (two words), prompt length.
    penalties: [rows + 1, 3] float32, see `Past`. tokens: [rows, tokens] int32, of requests that are penalised; there
    from the first of them on.
    """

    def __init__(self, num_rows: int, max_pages: int, dummy_page: int, device: torch.device) -> None:
        self.dummy = num_rows
        self.page_table = torch.full((num_rows + 1, max_pages), dummy_page, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.params = torch.zeros(num_rows + 1, 8, dtype=torch.int32, device=device)
        self.penalties = torch.zeros(num_rows + 1, 3, device=device)
        self.tokens = torch.empty(num_rows, 0, dtype=torch.int32, device=device)
        self.tables = RowTables(self.page_table, self.lengths, self.last_token, self.params)
        self._known = np.zeros(num_rows, np.int32)  # pages of each row that the device has
        self._decoding: tuple[Sequence[Request], np.ndarray] = [], np.empty(0, np.int32)  # last, and their rows

    def admit(self, request: Request) -> None:
        """A request has taken a row: nothing there holds for it."""
        self._known[request.row] = 0
        self._decoding = [], np.empty(0, np.int32)

    def page_deltas(self, requests: Sequence[Request]) -> np.ndarray:
        """[2, D] int32: places in the table, flat, and pages that the requests hold and the device doesn't know yet."""
        places: list[int] = []
        found: list[int] = []
        known, width = self._known.tolist(), self.page_table.shape[1]
        for request in requests:
            row, pages = request.row, request.pages
            if known[row] < len(pages):
                places += range(row * width + known[row], row * width + len(pages))
                found += pages[known[row] :]
                self._known[row] = len(pages)
        return np.array([places, found], np.int32)

    def decode_words(self, requests: Sequence[Request], grown: Sequence[tuple[int, int]], words: np.ndarray) -> None:
        """Fills `words` [3, R], see `kernels.prepare`, for requests that decode; of `grown`, places gained pages."""
        if requests != self._decoding[0]:  # mostly they are those of the step before
            self._decoding = requests, np.array([r.row for r in requests], np.int32)
        words[0, : len(requests)] = self._decoding[1]
        if grown:
            places, pages = np.array(grown, np.int32).T
            rows = self._decoding[1][places]
            words[1, places], words[2, places] = self._known[rows], pages
            self._known[rows] += 1

    def write_pages(self, deltas: Tensor) -> None:
        """Enters `page_deltas` [2, D]."""
        self.page_table.view(-1).index_copy_(0, deltas[0].long(), deltas[1])

    def write_params(self, rows: Tensor, words: Tensor) -> None:
        """Enters lines [R, 12] int32 of `param_words`."""
        self.params.index_copy_(0, rows.long(), words[:, :8])
        self.penalties.index_copy_(0, rows.long(), words[:, 8:11].view(torch.float32))

    def keep_tokens(self, request: Request, most: int) -> None:
        """Begins to keep the tokens of a request; any has `most` at most."""
        if not self.tokens.numel():
            self.tokens = self.tokens.new_zeros(self.dummy, most)
        (tokens,) = upload(self.tokens.device, np.frombuffer(request.tokens, np.int32))
        self.tokens[request.row, : len(tokens)] = tokens

    def past(self, rows: Tensor, length: int) -> Past:
        """Of requests in `rows` [R], of which those that are penalised have at most `length` tokens."""
        return Past(self.tokens[:, :length].index_select(0, rows), self.penalties.index_select(0, rows))

    def append(self, rows: Tensor, places: Tensor, tokens: Tensor) -> None:
        """Keeps `tokens` [R] int64 that were sampled, at their positions `places` [R]; the host needn't know them."""
        self.tokens[rows.long(), places.long()] = tokens.to(torch.int32)


def param_words(request: Request, seed: int) -> np.ndarray:
    """The request's line of `DeviceRows.params`, and of `DeviceRows.penalties`: 8 and 4 words."""
    p = request.params
    words = np.zeros(12, np.int32)
    words[:3] = np.array([p.temperature, p.top_p, p.min_p], np.float32).view(np.int32)
    words[3] = p.top_k or 0
    words[4:6] = np.array([seed], np.int64).view(np.int32)
    words[6] = request.num_prompt
    words[8:11] = np.array([p.repetition_penalty, p.frequency_penalty, p.presence_penalty], np.float32).view(np.int32)
    return words


class RowParams:
    """Lines of `DeviceRows.params` by name: each [R]."""

    def __init__(self, words: Tensor) -> None:
        self.words = words
        self.temperature, self.top_p, self.min_p = words[:, :3].view(torch.float32).unbind(1)
        self.top_k = words[:, 3]
        self.seed = words.view(torch.int64)[:, 2]
        self.num_prompt = words[:, 6]
