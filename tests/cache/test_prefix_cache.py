"""Behaviour of the prefix cache, the same for both implementations."""

from __future__ import annotations

import logging
import sys
from array import array

import numpy as np
import pytest

from minisgl.cache import prefix
from minisgl.cache.prefix import Implementation, PrefixCache, make_prefix_cache


@pytest.fixture(params=["python", "cpp"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "cpp":
        pytest.importorskip("minisgl._C", reason="the C++ extension isn't built")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def cache(implementation: Implementation) -> PrefixCache:
    return make_prefix_cache(2, implementation)


def ids(*values: int) -> array[int]:
    return array("i", values)


def matched(cache: PrefixCache, *tokens: int) -> list[int]:
    return cache.match(ids(*tokens)).pages.tolist()


def test_match_empty_tree_gives_root(cache: PrefixCache) -> None:
    match = cache.match(ids(1, 2, 3, 4))
    assert match.node == 0
    assert match.pages.tolist() == [] and match.pages.dtype == np.int32
    assert cache.match(ids()).node == 0
    assert cache.match_length(ids()) == 0


def test_insert_then_match_gives_pages_in_order(cache: PrefixCache) -> None:
    node, existing = cache.insert(ids(1, 2, 3, 4, 5, 6), ids(30, 10, 20))
    assert existing == 0
    match = cache.match(ids(1, 2, 3, 4, 5, 6, 7, 8))
    assert (match.node, match.pages.tolist()) == (node, [30, 10, 20])
    assert (cache.num_pages, cache.num_evictable_pages) == (3, 3)


def test_insert_without_pages_gives_root(cache: PrefixCache) -> None:
    assert cache.insert(ids(1), ids()) == (0, 0)
    assert cache.num_pages == 0


def test_match_counts_full_pages_only(cache: PrefixCache) -> None:
    cache.insert(ids(1, 2, 3, 4), ids(10, 11))
    assert matched(cache, 1, 2, 3) == [10]
    assert matched(cache, 1) == []
    assert matched(cache, 1, 2, 3, 9) == [10]


@pytest.mark.parametrize(("limit", "length"), [(None, 4), (100, 4), (4, 4), (3, 2), (2, 2), (1, 0), (0, 0), (-1, 0)])
def test_match_limit_is_in_tokens_and_rounds_down(cache: PrefixCache, limit: int | None, length: int) -> None:
    cache.insert(ids(1, 2, 3, 4), ids(10, 11))
    assert cache.match_length(ids(1, 2, 3, 4), limit) == length
    assert len(cache.match(ids(1, 2, 3, 4), limit).pages) * 2 == length


def test_insert_ignores_tokens_beyond_pages(cache: PrefixCache) -> None:
    cache.insert(ids(1, 2, 3, 4, 5), ids(10))
    assert matched(cache, 1, 2, 3, 4) == [10]


def test_insert_keeps_own_pages_where_path_exists(cache: PrefixCache) -> None:
    cache.insert(ids(1, 2, 3, 4), ids(10, 11))
    node, existing = cache.insert(ids(1, 2, 3, 4, 5, 6), ids(20, 21, 22))
    assert existing == 2
    assert matched(cache, 1, 2, 3, 4, 5, 6) == [10, 11, 22]
    assert cache.insert(ids(1, 2, 3, 4, 5, 6), ids(30, 31, 32)) == (node, 3)
    cache.check_integrity()


def test_insert_diverging_shares_common_pages(cache: PrefixCache) -> None:
    cache.insert(ids(1, 2, 3, 4, 5, 6), ids(10, 11, 12))
    _, existing = cache.insert(ids(1, 2, 3, 4, 7, 8), ids(20, 21, 22))
    assert existing == 2
    assert matched(cache, 1, 2, 3, 4, 5, 6) == [10, 11, 12]
    assert matched(cache, 1, 2, 3, 4, 7, 8) == [10, 11, 22]
    assert cache.num_pages == 4


def test_pages_differing_within_are_apart(cache: PrefixCache) -> None:
    cache.insert(ids(1, 2), ids(10))
    _, existing = cache.insert(ids(1, 3), ids(11))
    assert existing == 0
    assert matched(cache, 1, 2) == [10]
    assert matched(cache, 1, 3) == [11]


def test_match_length_changes_nothing(cache: PrefixCache) -> None:
    cache.insert(ids(1, 2), ids(10))
    cache.insert(ids(3, 4, 5, 6), ids(11, 12))
    assert cache.match_length(ids(1, 2)) == 2  # neither the order of use
    assert cache.match_length(ids(3, 4)) == 2  # nor the nodes
    assert cache.evict(1).tolist() == [10]
    assert cache.evict(2).tolist() == [11, 12]


def test_evict_takes_least_recently_used_leaf_first(cache: PrefixCache) -> None:
    for first in (1, 2, 3):
        cache.insert(ids(first, first), ids(10 + first))
    matched(cache, 1, 1)
    assert cache.evict(1).tolist() == [12]
    assert cache.evict(2).tolist() == [13, 11]


def test_evict_takes_children_before_their_parent(cache: PrefixCache) -> None:
    cache.insert(ids(1, 1, 2, 2), ids(10, 11))
    cache.insert(ids(1, 1, 3, 3), ids(10, 12))
    cache.insert(ids(4, 4), ids(13))
    assert cache.evict(9).tolist() == [11, 12, 10, 13]
    assert (cache.num_pages, cache.num_evictable_pages) == (0, 0)


def test_evict_parent_used_later_than_others_waits_its_turn(cache: PrefixCache) -> None:
    cache.insert(ids(1, 1, 2, 2), ids(10, 11))
    cache.insert(ids(3, 3), ids(12))
    matched(cache, 1, 1)
    assert cache.evict(3).tolist() == [11, 12, 10]


def test_evict_trims_last_leaf_from_its_end(cache: PrefixCache) -> None:
    cache.insert(ids(1, 1, 2, 2, 3, 3), ids(10, 11, 12))
    assert cache.evict(2).tolist() == [11, 12]
    cache.check_integrity()
    assert matched(cache, 1, 1, 2, 2) == [10]
    cache.insert(ids(1, 1, 2, 2), ids(20, 21))
    assert matched(cache, 1, 1, 2, 2) == [10, 21]


@pytest.mark.parametrize("count", [0, -1])
def test_evict_nothing_gives_empty_array(cache: PrefixCache, count: int) -> None:
    cache.insert(ids(1, 1), ids(10))
    freed = cache.evict(count)
    assert freed.tolist() == [] and freed.dtype == np.int32
    assert cache.num_pages == 1


def test_lock_protects_whole_path(cache: PrefixCache) -> None:
    cache.insert(ids(1, 1), ids(10))
    node, _ = cache.insert(ids(1, 1, 2, 2), ids(10, 11))
    cache.insert(ids(1, 1, 3, 3), ids(10, 12))
    cache.lock(node)
    assert cache.num_evictable_pages == 1
    assert cache.evict(9).tolist() == [12]
    cache.unlock(node)
    assert cache.evict(9).tolist() == [11, 10]


def test_locks_are_counted(cache: PrefixCache) -> None:
    node, _ = cache.insert(ids(1, 1), ids(10))
    cache.lock(node)
    cache.lock(node)
    cache.unlock(node)
    assert cache.evict(1).tolist() == []
    cache.unlock(node)
    assert cache.evict(1).tolist() == [10]


def test_unlock_makes_path_most_recently_used(cache: PrefixCache) -> None:
    first, _ = cache.insert(ids(1, 1), ids(10))
    cache.lock(first)
    cache.insert(ids(2, 2), ids(11))
    cache.unlock(first)
    assert cache.evict(2).tolist() == [11, 10]


def test_unlock_node_with_children_leaves_them_first_to_go(cache: PrefixCache) -> None:
    node, _ = cache.insert(ids(1, 1), ids(10))
    cache.lock(node)
    cache.insert(ids(1, 1, 2, 2), ids(10, 11))
    cache.unlock(node)
    assert cache.evict(1).tolist() == [11]
    assert cache.evict(1).tolist() == [10]


def test_split_of_locked_node_keeps_handle_and_lock(cache: PrefixCache) -> None:
    node, _ = cache.insert(ids(1, 1, 2, 2), ids(10, 11))
    cache.lock(node)
    upper = cache.match(ids(1, 1)).node
    assert upper != node
    cache.check_integrity()
    assert cache.evict(9).tolist() == []
    cache.lock(upper)
    cache.unlock(node)
    assert cache.num_evictable_pages == 1
    assert cache.evict(9).tolist() == [11]
    cache.unlock(upper)
    assert cache.evict(9).tolist() == [10]


def test_split_keeps_recency_of_lower_part(cache: PrefixCache) -> None:
    cache.insert(ids(1, 1, 2, 2), ids(10, 11))
    cache.insert(ids(3, 3), ids(12))
    matched(cache, 1, 1)
    assert cache.evict(1).tolist() == [11]
    assert cache.evict(1).tolist() == [12]


def test_root_can_be_locked_and_unlocked(cache: PrefixCache) -> None:
    cache.lock(0)
    cache.unlock(0)
    cache.check_integrity()


def test_node_ids_are_reused(cache: PrefixCache) -> None:
    first, _ = cache.insert(ids(1, 1), ids(10))
    cache.evict(1)
    second, _ = cache.insert(ids(2, 2), ids(10))
    assert first == second


def test_unlock_without_lock_raises(cache: PrefixCache) -> None:
    node, _ = cache.insert(ids(1, 1), ids(10))
    with pytest.raises(ValueError, match=f"node {node} has no lock"):
        cache.unlock(node)


@pytest.mark.parametrize("node", [-1, 1, 99])
def test_unknown_node_raises(cache: PrefixCache, node: int) -> None:
    with pytest.raises(ValueError, match=f"node {node} is not in the tree"):
        cache.lock(node)
    with pytest.raises(ValueError, match=f"node {node} is not in the tree"):
        cache.unlock(node)


def test_evicted_node_is_unknown(cache: PrefixCache) -> None:
    node, _ = cache.insert(ids(1, 1), ids(10))
    cache.evict(1)
    with pytest.raises(ValueError, match="not in the tree"):
        cache.lock(node)


def test_insert_with_too_few_tokens_raises(cache: PrefixCache) -> None:
    with pytest.raises(ValueError, match="3 tokens are too few for 2 pages of 2"):
        cache.insert(ids(1, 2, 3), ids(10, 11))
    assert cache.num_pages == 0


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2],
        array("q", [1, 2]),
        array("f", [1, 2]),
        np.array([1, 2], np.int64),
        np.array([1, 2], np.uint32),
        np.array([1, 2], ">i4"),
        np.array([[1, 2]], np.int32),
        np.array([1, 0, 2, 0], np.int32)[::2],
    ],
    ids=["list", "array-q", "array-f", "int64", "uint32", "big-endian", "matrix", "strided"],
)
def test_wrong_buffer_raises(cache: PrefixCache, tokens: object) -> None:
    with pytest.raises(TypeError, match="tokens must be array"):
        cache.match(tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pages must be array"):
        cache.insert(ids(1, 2, 3, 4), tokens)  # type: ignore[arg-type]


def test_numpy_and_read_only_buffers_are_accepted(cache: PrefixCache) -> None:
    tokens = np.array([1, 2, 3, 4], np.int32)
    tokens.flags.writeable = False
    cache.insert(tokens, np.array([10, 11], np.int32))
    assert cache.match(tokens[:2]).pages.tolist() == [10]


def test_tree_keeps_no_reference_to_buffers(cache: PrefixCache) -> None:
    tokens, pages = np.array([1, 2, 3, 4], np.int32), np.array([10, 11], np.int32)
    cache.insert(tokens, pages)
    tokens[:] = 9
    pages[:] = 9
    found = cache.match(ids(1, 2, 3, 4)).pages
    assert found.tolist() == [10, 11]
    found[:] = 9
    assert matched(cache, 1, 2, 3, 4) == [10, 11]


def test_reset_returns_all_pages_even_locked(cache: PrefixCache) -> None:
    node, _ = cache.insert(ids(1, 1, 2, 2), ids(10, 11))
    cache.lock(node)
    cache.insert(ids(3, 3), ids(12))
    assert cache.reset().tolist() == [10, 11, 12]
    assert (cache.num_pages, cache.num_evictable_pages) == (0, 0)
    assert cache.match_length(ids(3, 3)) == 0
    assert cache.insert(ids(3, 3), ids(12)) == (1, 0)
    cache.check_integrity()


def test_check_integrity_finds_page_owned_twice(cache: PrefixCache) -> None:
    cache.insert(ids(1, 1), ids(10))
    cache.insert(ids(2, 2), ids(10))
    with pytest.raises((AssertionError, RuntimeError), match="a page is in two places"):
        cache.check_integrity()


def test_page_size_below_one_raises(implementation: Implementation) -> None:
    with pytest.raises(ValueError, match="page_size is 0; expected at least 1"):
        make_prefix_cache(0, implementation)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_many_sequences_share_prefixes(implementation: Implementation, page_size: int) -> None:
    """Enough nodes for the hash table to grow, with splits on the way; every match is right afterwards."""
    cache, rng = make_prefix_cache(page_size, implementation), np.random.default_rng(0)
    stem = rng.integers(0, 1000, 6 * page_size, dtype=np.int32)
    expected, next_page = {}, 0
    for index in range(300):
        depth = int(rng.integers(0, 7)) * page_size
        tokens = np.concatenate([stem[:depth], np.full(2 * page_size, 1000 + index, np.int32)])
        pages = np.arange(next_page, next_page + len(tokens) // page_size, dtype=np.int32)
        next_page += len(pages)
        _, existing = cache.insert(tokens, pages)
        expected[index] = (tokens, pages, existing)
    cache.check_integrity()
    for tokens, pages, existing in expected.values():
        assert cache.match(tokens).pages.tolist()[existing:] == pages.tolist()[existing:]
    assert len(cache.evict(cache.num_pages)) == 300 * 2 + 6
    cache.check_integrity()


def test_auto_without_extension_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "minisgl._C", None)  # makes its import fail
    prefix._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert type(make_prefix_cache(16)).__name__ == "ReferencePrefixCache"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "extension isn't built" in caplog.text
    with pytest.raises(ImportError):
        make_prefix_cache(16, "cpp")


def test_auto_takes_extension_when_built() -> None:
    extension = pytest.importorskip("minisgl._C", reason="the C++ extension isn't built")
    assert isinstance(make_prefix_cache(16), extension.PrefixCache)


def test_common_prefix_is_exact_at_every_position() -> None:
    extension = pytest.importorskip("minisgl._C", reason="the C++ extension isn't built")
    for size in (0, 1, 63, 64, 65, 200):
        a = np.arange(size, dtype=np.int32)
        assert extension.common_prefix(a, a.copy()) == size
        assert extension.common_prefix(a, np.arange(size + 5, dtype=np.int32)) == size
        for position in range(size):
            b = a.copy()
            b[position] ^= -0x80000000 if position % 2 else 1
            assert extension.common_prefix(a, b) == position
