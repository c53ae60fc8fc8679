"""Random operations on the prefix cache against a naive model, and on both implementations side by side.

The model knows pages only, no nodes: each cached page by the tokens that lead to it, when its path was last used, and
how many locks cover it. What a tree must do follows from that by definition.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from minisgl.cache.prefix import Implementation, PrefixCache, PrefixMatch, make_prefix_cache

Path = tuple[int, ...]  # the tokens of one or more full pages


@dataclass
class Page:
    """One cached page of the model."""

    id: int
    used: int  # when its path was last used
    locks: int = 0


class Model:
    """The prefix cache by definition: slow, and with nothing to get wrong."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[Path, Page] = {}
        self.clock = 0

    def prefixes(self, path: Path) -> list[Path]:
        return [path[:end] for end in range(self.page_size, len(path) + 1, self.page_size)]

    def match(self, tokens: Path) -> Path:
        found = [prefix for prefix in self.prefixes(tokens) if prefix in self.pages]
        return found[-1] if found else ()

    def use(self, path: Path) -> None:
        self.clock += 1
        for prefix in self.prefixes(path):
            self.pages[prefix].used = self.clock

    def insert(self, path: Path, ids: list[int]) -> int:
        existing = len(self.match(path)) // self.page_size
        for prefix, id in list(zip(self.prefixes(path), ids, strict=True))[existing:]:
            self.pages[prefix] = Page(id, self.clock)
        self.use(path)
        return existing

    def lock(self, path: Path) -> None:
        for prefix in self.prefixes(path):
            self.pages[prefix].locks += 1

    def unlock(self, path: Path) -> None:
        self.clock += 1
        for prefix in self.prefixes(path):
            page = self.pages[prefix]
            page.locks -= 1
            if page.locks == 0:
                page.used = self.clock

    def evict(self, count: int) -> list[int]:
        freed = []
        while len(freed) < count and (leaves := self.unlocked_leaves()):
            least = min(leaves, key=lambda path: self.pages[path].used)
            freed.append(self.pages.pop(least).id)
        return freed

    def unlocked_leaves(self) -> list[Path]:
        parents = {path[: -self.page_size] for path in self.pages}
        return [path for path, page in self.pages.items() if page.locks == 0 and path not in parents]

    def evictable(self) -> int:
        return sum(page.locks == 0 for page in self.pages.values())


def plain(result: object) -> object:
    """A result with its arrays as lists, so that results compare."""
    if isinstance(result, PrefixMatch):
        return (result.node, result.pages.tolist())
    return result.tolist() if hasattr(result, "tolist") else result


class PrefixMachine(RuleBasedStateMachine):
    """Every operation goes to the model and to each of `implementations`, whose results must be the same."""

    implementations: ClassVar[tuple[Implementation, ...]] = ("python",)

    @initialize(page_size=st.sampled_from([1, 2, 3, 16]))
    def start(self, page_size: int) -> None:
        self.page_size = page_size
        self.caches = [make_prefix_cache(page_size, implementation) for implementation in self.implementations]
        self.model = Model(page_size)
        self.next_page = 0
        self.locked: list[tuple[int, Path]] = []  # handle and what it stands for

    def ask(self, call: Callable[[PrefixCache], object]) -> Any:
        results = [plain(call(cache)) for cache in self.caches]
        assert all(result == results[0] for result in results), results
        return results[0]

    def tokens(self, pages: list[int], rest: int = 0) -> Path:
        """Tokens of pages that differ in their last token only, plus up to a page less one more."""
        page_tokens = [[7] * (self.page_size - 1) + [kind] for kind in pages]
        return tuple(token for page in page_tokens for token in page) + (7,) * (rest % self.page_size)

    @rule(pages=st.lists(st.integers(0, 2), max_size=8), rest=st.integers(0, 15), lock=st.booleans())
    def insert(self, pages: list[int], rest: int, lock: bool) -> None:
        tokens = self.tokens(pages, rest)
        path = self.tokens(pages)
        ids = list(range(self.next_page, self.next_page + len(pages)))
        self.next_page += len(pages)
        node, existing = self.ask(lambda cache: cache.insert(array("i", tokens), array("i", ids)))
        assert existing == self.model.insert(path, ids)
        self.lock_if(lock, node, path)

    @rule(
        pages=st.lists(st.integers(0, 2), max_size=9),
        rest=st.integers(0, 15),
        limit=st.none() | st.integers(0, 150),
        lock=st.booleans(),
    )
    def match(self, pages: list[int], rest: int, limit: int | None, lock: bool) -> None:
        tokens = self.tokens(pages, rest)
        path = self.model.match(tokens[:limit])
        assert self.ask(lambda cache: cache.match_length(array("i", tokens), limit)) == len(path)
        node, found = self.ask(lambda cache: cache.match(array("i", tokens), limit))
        assert found == [self.model.pages[prefix].id for prefix in self.model.prefixes(path)]
        assert (node == 0) == (path == ())
        self.model.use(path)
        self.lock_if(lock, node, path)

    def lock_if(self, wanted: bool, node: int, path: Path) -> None:
        if wanted:
            self.ask(lambda cache: cache.lock(node))
            self.model.lock(path)
            self.locked.append((node, path))

    @precondition(lambda self: self.locked)
    @rule(data=st.data(), again=st.booleans())
    def lock_or_unlock(self, data: st.DataObject, again: bool) -> None:
        """Handles stay good however often the tree was split since, for one more lock too."""
        index = data.draw(st.integers(0, len(self.locked) - 1))
        if again:
            self.lock_if(True, *self.locked[index])
            return
        node, path = self.locked.pop(index)
        self.ask(lambda cache: cache.unlock(node))
        self.model.unlock(path)

    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        freed = self.ask(lambda cache: cache.evict(count))
        assert sorted(freed) == sorted(self.model.evict(count))

    @rule(count=st.integers(8, 50))
    def evict_many(self, count: int) -> None:
        self.evict(count)

    @rule(sure=st.integers(0, 9))
    def reset(self, sure: int) -> None:
        if sure != 0:  # seldom
            return
        freed = self.ask(lambda cache: cache.reset())
        assert sorted(freed) == sorted(page.id for page in self.model.pages.values())
        self.model.pages.clear()
        self.locked.clear()

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "caches"):
            assert self.ask(lambda cache: cache.num_pages) == len(self.model.pages)
            assert self.ask(lambda cache: cache.num_evictable_pages) == self.model.evictable()
            self.ask(lambda cache: cache.check_integrity())

    def teardown(self) -> None:
        """Once all locks are gone everything can be evicted, in the model's order page by page."""
        if not hasattr(self, "caches"):
            return
        for node, path in self.locked:
            self.ask(lambda cache, node=node: cache.unlock(node))  # type: ignore[misc]
            self.model.unlock(path)
        while self.model.pages:
            assert self.ask(lambda cache: cache.evict(1)) == self.model.evict(1)
        assert self.ask(lambda cache: cache.num_pages) == 0


class SideBySideMachine(PrefixMachine):
    implementations = ("python", "cpp")


quick = settings(max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))


def test_reference_follows_naive_model() -> None:
    run_state_machine_as_test(PrefixMachine, settings=quick)


def test_cpp_follows_reference() -> None:
    pytest.importorskip("minisgl._C", reason="the C++ extension isn't built")
    run_state_machine_as_test(SideBySideMachine, settings=quick)
