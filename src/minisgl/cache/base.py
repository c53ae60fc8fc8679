"""The interface of a prefix cache: which KV pages already hold the beginning of a sequence."""

from __future__ import annotations

from array import array
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int32Buffer: TypeAlias = "array[int] | Int32Array"  # one-dimensional, contiguous, 32-bit: array('i') or np.int32


class PrefixMatch(NamedTuple):
    """The longest cached prefix of a sequence.

    `node` stands for exactly the matched path (0, the root, when nothing matched); `pages` has one id a full page.
    """

    node: int
    pages: Int32Array


class PrefixCache(Protocol):
    """A radix tree over token ids, in steps of a page, that owns the KV pages its nodes name.

    A node is a run of pages; its children differ in their first page. Handles (node ids) are small integers, valid
    while locked or else until the next call that changes the tree. A split leaves the handle with the lower part, so a
    locked handle stands for the same path for as long as it is locked.

    Recency: `match` and `insert` make every node on their path the most recently used, `unlock` those that it leaves
    without a lock; on a path, a parent counts as used after its child. `evict` takes the least recently used first.

    Errors: TypeError for a buffer that isn't 32-bit, one-dimensional and contiguous; ValueError for a node that isn't
    in the tree.
    """

    @property
    def page_size(self) -> int:
        """Tokens of a page."""

    @property
    def num_pages(self) -> int:
        """Pages that the tree owns."""

    @property
    def num_evictable_pages(self) -> int:
        """Pages that `evict` could free now: those of nodes without a lock."""

    def match(self, tokens: Int32Buffer, limit: int | None = None) -> PrefixMatch:
        """Finds the longest cached prefix, in full pages, among the first `limit` tokens.

        Where it ends inside a node, the node is split.
        """

    def match_length(self, tokens: Int32Buffer, limit: int | None = None) -> int:
        """The tokens that `match` would find; changes neither the tree nor the order of eviction."""

    def insert(self, tokens: Int32Buffer, pages: Int32Buffer) -> tuple[int, int]:
        """Adds the path of the first `len(pages) * page_size` tokens.

        Returns:
            The node that stands for the whole path, and how many leading pages were there already. For those the tree
            keeps its own pages and the caller keeps his; the pages after them now belong to the tree.

        Raises:
            ValueError: fewer tokens than the pages need.
        """

    def lock(self, node: int) -> None:
        """Keeps the path from the root to `node` from eviction until as many calls of `unlock`."""

    def unlock(self, node: int) -> None:
        """Takes one lock back. ValueError: there is none."""

    def evict(self, num_pages: int) -> Int32Array:
        """Frees the `num_pages` least recently used pages, or all that have no lock if those are fewer.

        Whole leaves go in order of use; of the last one only as many pages as are missing, from its end.
        """

    def reset(self) -> Int32Array:
        """Empties the tree, locks or not, and returns all pages (in order of node id). No handle stays valid."""

    def check_integrity(self) -> None:
        """Verifies every invariant of the structure; AssertionError or RuntimeError says which one fails."""
