"""Who holds which page. The scheduler decides; the ledger keeps the accounts.

A page is free, held by the prefix cache, held by a running request, or deferred: given up while a step that may
still touch it is in flight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minisgl.cache.prefix import PrefixCache
from minisgl.timing import span
from minisgl.types import Request


@dataclass(frozen=True, slots=True)
class _Release:
    """What a request gave up, to take effect when `step` is collected."""

    step: int
    pages: list[int]
    node: int
    row: int


class PageLedger:
    """Free pages and rows, and what requests hold of both.

    Of the requests in rows, [num_rows] int32 each: `computed`, the positions whose forward pass was launched;
    `last_step`, the last one launched that includes the request.
    """

    def __init__(self, num_pages: int, page_size: int, num_rows: int, cache: PrefixCache | None) -> None:
        self.num_pages, self.page_size, self.num_rows, self.cache = num_pages, page_size, num_rows, cache
        self.free = list(range(num_pages - 1, -1, -1))
        self.free_rows = list(range(num_rows - 1, -1, -1))
        self.deferred: list[_Release] = []
        self.computed, self.last_step = np.zeros((2, num_rows), np.int32)
        self._collected = -1  # last step collected

    def _available(self) -> int:
        return len(self.free) + (self.cache.num_evictable_pages if self.cache else 0)

    def take(self, request: Request, num_pages: int) -> bool:
        """Adds pages to a request, evicting cached ones if need be. False, and nothing done, if there aren't enough."""
        lacking = num_pages - len(self.free)
        if lacking > 0:
            if self.cache is None or self._available() < num_pages:
                return False
            self.free.extend(self.cache.evict(lacking).tolist())
        request.pages += self.free[: -num_pages - 1 : -1]
        del self.free[len(self.free) - num_pages :]
        return True

    def admit(self, request: Request, watermark: int) -> bool:
        """Gives a request what the prefix cache has of its tokens, pages for the rest, and a row.

        Afterwards `watermark` pages are still to be had, or nothing is done and the answer is False. At least the last
        token stays uncached, for its logits are needed; where those of the whole prompt are, nothing is taken.
        """
        needed = -(-len(request.tokens) // self.page_size)
        if not self.cache:
            if len(self.free) < needed + watermark:
                return False
        else:
            tokens = np.frombuffer(request.tokens, np.int32)
            limit = 0 if request.params.prompt_logprobs else len(tokens) - 1
            with span("radix match"):
                hit = self.cache.match_length(tokens, limit) // self.page_size
            if self._available() < needed - hit + watermark:
                return False  # cheap: nothing was touched
            with span("radix match"):
                match = self.cache.match(tokens, limit)
                self.cache.lock(match.node)
            if self._available() < needed - hit + watermark:  # what it matched can't be evicted for it any more
                self.cache.unlock(match.node)
                return False
            request.node, request.pages = match.node, match.pages.tolist()
            request.num_tree_pages = len(request.pages)
        took = self.take(request, needed - len(request.pages))
        assert took
        request.row = self.free_rows.pop()
        self.computed[request.row] = request.num_tree_pages * self.page_size
        self.last_step[request.row] = -1
        return True

    def _num_full_pages(self, request: Request) -> int:
        """Full pages of tokens that are both known and computed."""
        return min(len(request.tokens), int(self.computed[request.row])) // self.page_size

    def _insert(self, request: Request, num_pages: int) -> int:
        """Hands the first `num_pages` pages to the tree and locks them; the number it had before is returned."""
        assert self.cache is not None
        tokens = np.frombuffer(request.tokens, np.int32)[: num_pages * self.page_size]
        with span("radix insert"):
            node, existing = self.cache.insert(tokens, np.array(request.pages[:num_pages], np.int32))
            self.cache.lock(node)
            self.cache.unlock(request.node)
        request.node = node
        return existing

    def cache_prefix(self, request: Request) -> None:
        """Shares the full pages of a running request through the prefix cache.

        A step in flight may still be writing them; whoever matches them is launched later, on the same stream.
        When another request put the same tokens there meanwhile, this one keeps its own pages until it ends: holding
        both copies could leave a lone request without room.
        """
        count, held = self._num_full_pages(request), request.num_tree_pages
        if self.cache is None or count <= held:
            return
        tokens = np.frombuffer(request.tokens, np.int32)
        if self.cache.match_length(tokens, count * self.page_size) == held * self.page_size:
            self._insert(request, count)
            request.num_tree_pages = count

    def release(self, request: Request) -> None:
        """Takes everything from a request: full pages go to the prefix cache, the rest back to the free list."""
        held = request.num_tree_pages
        private = request.pages[held:]
        if self.cache is not None:
            count = max(self._num_full_pages(request), held)
            existing = max(self._insert(request, count), held)
            private = request.pages[held:existing] + request.pages[count:]
        release = _Release(int(self.last_step[request.row]), private, request.node, request.row)
        request.pages, request.num_tree_pages = [], 0
        request.node = request.row = -1
        if release.step > self._collected:
            self.deferred.append(release)
        else:
            self._apply(release)

    def _apply(self, release: _Release) -> None:
        self.free.extend(release.pages)
        self.free_rows.append(release.row)
        if self.cache is not None:
            self.cache.unlock(release.node)

    def collected(self, step: int) -> None:
        """A step has ended: what was waiting for it is free."""
        self._collected = step
        if self.deferred:
            due = [r for r in self.deferred if r.step <= step]
            self.deferred = [r for r in self.deferred if r.step > step]
            for release in due:
                self._apply(release)

    def check_integrity(self, running: Iterable[Request]) -> None:
        """AssertionError unless every page and row has exactly one owner."""
        pages, rows = list(self.free), list(self.free_rows)
        for release in self.deferred:
            pages += release.pages
            rows.append(release.row)
        for request in running:
            pages += request.pages[request.num_tree_pages :]
            rows.append(request.row)
        cached = 0
        if self.cache is not None:
            self.cache.check_integrity()
            cached = self.cache.num_pages
        assert len(set(pages)) == len(pages), "a page has two owners"
        assert len(pages) + cached == self.num_pages, f"{self.num_pages - len(pages) - cached} pages lost"
        assert sorted(rows) == list(range(self.num_rows)), "a row is lost or held twice"
