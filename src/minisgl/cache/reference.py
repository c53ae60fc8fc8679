"""The prefix cache in plain Python: the oracle of the C++ tree, and what serves where no compiler was at hand.

The order of eviction needs no clock. All nodes without a lock stand in one list, least recently used first, and
whatever touches a path moves its nodes to the end from the deepest up. So children always stand before their parent,
the first node of the list is always a leaf, and eviction is: take the first.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from minisgl.cache.base import Int32Array, Int32Buffer, PrefixMatch


class _Node:
    """A run of pages: `tokens` [num_pages * page_size] and `pages` [num_pages], both int32."""

    __slots__ = ("children", "id", "locks", "pages", "parent", "tokens")

    def __init__(self, id: int, parent: _Node | None, tokens: Int32Array, pages: Int32Array, locks: int) -> None:
        self.id = id
        self.parent = parent
        self.tokens = tokens.copy()  # never a view: it would keep the caller's whole array alive
        self.pages = pages.copy()
        self.children: dict[bytes, _Node] = {}  # by the token ids of their first page
        self.locks = locks


def _int32(buffer: Int32Buffer, name: str) -> Int32Array:
    """The buffer as an array, without a copy."""
    values = np.asarray(buffer)
    if values.dtype != np.int32 or values.ndim != 1 or not values.flags.c_contiguous:
        raise TypeError(f"{name} must be array('i') or a contiguous one-dimensional array of np.int32")
    return values


class ReferencePrefixCache:
    """See `base.PrefixCache`."""

    def __init__(self, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; expected at least 1")
        self.page_size = page_size
        self._clear()

    def _clear(self) -> None:
        empty = np.empty(0, np.int32)
        self._root = _Node(0, None, empty, empty, 0)
        self._nodes: list[_Node | None] = [self._root]  # by id
        self._free_ids: list[int] = []
        self._lru: OrderedDict[int, _Node] = OrderedDict()  # every node without a lock, but for the root
        self.num_pages = 0
        self.num_evictable_pages = 0

    def match(self, tokens: Int32Buffer, limit: int | None = None) -> PrefixMatch:
        node, used, _ = self._descend(*self._full_pages(tokens, limit))
        if used < len(node.pages):
            node = self._split(node, used)
        self._touch(node)
        parts = [part.pages for part in self._path(node)]
        return PrefixMatch(node.id, np.concatenate([self._root.pages, *reversed(parts)]))

    def match_length(self, tokens: Int32Buffer, limit: int | None = None) -> int:
        return self._descend(*self._full_pages(tokens, limit))[2] * self.page_size

    def insert(self, tokens: Int32Buffer, pages: Int32Buffer) -> tuple[int, int]:
        ids, new_pages = _int32(tokens, "tokens"), _int32(pages, "pages")
        end = len(new_pages) * self.page_size
        if len(ids) < end:
            raise ValueError(f"{len(ids)} tokens are too few for {len(new_pages)} pages of {self.page_size}")
        node, used, matched = self._descend(ids, len(new_pages))
        if used < len(node.pages):
            node = self._split(node, used)
        if matched < len(new_pages):
            start = matched * self.page_size
            node = self._add(node, ids[start:end], new_pages[matched:], locks=0)
            self.num_pages += len(node.pages)
            self.num_evictable_pages += len(node.pages)
        self._touch(node)
        return node.id, matched

    def lock(self, node: int) -> None:
        for part in self._path(self._node(node)):
            if part.locks == 0:
                del self._lru[part.id]
                self.num_evictable_pages -= len(part.pages)
            part.locks += 1

    def unlock(self, node: int) -> None:
        path = self._path(self._node(node))
        if path and path[0].locks == 0:
            raise ValueError(f"node {node} has no lock to take back")
        for part in path:
            part.locks -= 1
            if part.locks == 0:
                self._lru[part.id] = part
                self.num_evictable_pages += len(part.pages)

    def evict(self, num_pages: int) -> Int32Array:
        freed = [self._root.pages]
        missing = min(num_pages, self.num_evictable_pages)
        while missing > 0:
            leaf = next(iter(self._lru.values()))
            assert not leaf.children
            freed.append(self._cut(leaf, max(0, len(leaf.pages) - missing)))
            missing -= len(freed[-1])
        return np.concatenate(freed)

    def reset(self) -> Int32Array:
        pages = np.concatenate([node.pages for node in self._nodes if node is not None])
        self._clear()
        return pages

    def _node(self, id: int) -> _Node:
        node = self._nodes[id] if 0 <= id < len(self._nodes) else None
        if node is None:
            raise ValueError(f"node {id} is not in the tree")
        return node

    def _path(self, node: _Node) -> list[_Node]:
        """The node and its ancestors, deepest first, without the root."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path

    def _full_pages(self, tokens: Int32Buffer, limit: int | None) -> tuple[Int32Array, int]:
        ids = _int32(tokens, "tokens")
        length = len(ids) if limit is None else min(len(ids), max(0, limit))
        return ids, length // self.page_size

    def _key(self, tokens: Int32Array, page: int) -> bytes:
        return tokens[page * self.page_size : (page + 1) * self.page_size].tobytes()

    def _descend(self, tokens: Int32Array, num_pages: int) -> tuple[_Node, int, int]:
        """Follows the first `num_pages` pages: the last node reached, how many of its pages match, how many in all."""
        node, matched = self._root, 0
        while matched < num_pages:
            child = node.children.get(self._key(tokens, matched))
            if child is None:
                break
            node = child
            same = self._common_pages(node, tokens[matched * self.page_size : num_pages * self.page_size])
            matched += same
            if same < len(node.pages):
                return node, same, matched
        return node, len(node.pages), matched

    def _common_pages(self, node: _Node, tokens: Int32Array) -> int:
        length = min(len(node.tokens), len(tokens))
        different = np.flatnonzero(node.tokens[:length] != tokens[:length])
        return (int(different[0]) if len(different) else length) // self.page_size

    def _add(self, parent: _Node, tokens: Int32Array, pages: Int32Array, locks: int) -> _Node:
        """A new node below `parent`. Its place in the order of use is the caller's to give (`_touch`)."""
        id = self._free_ids.pop() if self._free_ids else len(self._nodes)
        node = _Node(id, parent, tokens, pages, locks)
        self._nodes[id : id + 1] = [node]
        parent.children[self._key(tokens, 0)] = node
        return node

    def _split(self, node: _Node, used: int) -> _Node:
        """Gives the first `used` pages of `node` to a new node above it, which is returned; to be touched next."""
        assert node.parent is not None
        cut = used * self.page_size
        upper = self._add(node.parent, node.tokens[:cut], node.pages[:used], node.locks)
        node.tokens, node.pages = node.tokens[cut:].copy(), node.pages[used:].copy()
        node.parent = upper
        upper.children[self._key(node.tokens, 0)] = node
        return upper

    def _touch(self, node: _Node) -> None:
        for part in self._path(node):
            if part.locks == 0:
                self._lru[part.id] = part
                self._lru.move_to_end(part.id)

    def _cut(self, leaf: _Node, keep: int) -> Int32Array:
        """Takes all pages but the first `keep` from an unlocked leaf, and the leaf away when none is left."""
        pages = leaf.pages[keep:]
        self.num_pages -= len(pages)
        self.num_evictable_pages -= len(pages)
        if keep > 0:
            leaf.tokens, leaf.pages = leaf.tokens[: keep * self.page_size], leaf.pages[:keep]
            return pages
        assert leaf.parent is not None
        del leaf.parent.children[self._key(leaf.tokens, 0)], self._lru[leaf.id]
        self._nodes[leaf.id] = None
        self._free_ids.append(leaf.id)
        return pages

    def check_integrity(self) -> None:
        live = [node for node in self._nodes[1:] if node is not None]
        for node in live:
            self._check_node(node)
        pages = np.concatenate([self._root.pages, *(node.pages for node in live)])
        _check(len(np.unique(pages)) == len(pages), "a page is in two places of the tree")
        _check(len(pages) == self.num_pages, f"num_pages is {self.num_pages}, the nodes hold {len(pages)}")
        unlocked = {node.id: node for node in live if node.locks == 0}
        evictable = sum(len(node.pages) for node in unlocked.values())
        _check(evictable == self.num_evictable_pages, f"evictable is {self.num_evictable_pages}, counted {evictable}")
        _check(unlocked.keys() == self._lru.keys(), "the list of use doesn't hold exactly the nodes without a lock")
        dead = [id for id, node in enumerate(self._nodes) if node is None]
        _check(sorted(self._free_ids) == dead, "the free ids aren't exactly the unused ones")
        _check(sum(len(node.children) for node in [self._root, *live]) == len(live), "a node isn't its parent's child")
        place = {id: index for index, id in enumerate(self._lru)}
        for node in unlocked.values():
            later = all(place[child.id] < place[node.id] for child in node.children.values())
            _check(later, f"node {node.id} counts as used before one of its children")

    def _check_node(self, node: _Node) -> None:
        name, parent = f"node {node.id}", node.parent
        _check(self._nodes[node.id] is node, f"{name} is filed under another id")
        _check(len(node.pages) > 0, f"{name} holds no page")
        _check(len(node.tokens) == len(node.pages) * self.page_size, f"{name}: tokens and pages don't fit together")
        _check(parent is not None and parent.children.get(self._key(node.tokens, 0)) is node, f"{name} is no child")
        _check(node.locks >= sum(child.locks for child in node.children.values()), f"{name} has fewer locks than below")


def _check(ok: bool, text: str) -> None:
    if not ok:
        raise AssertionError(f"prefix cache: {text}")
