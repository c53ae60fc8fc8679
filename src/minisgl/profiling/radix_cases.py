"""The prefix cache in the registry: insert, match and evict of the C++ tree and of the Python one; its inner loop.

It lies here, not in `kernels/`, since the tree belongs to `cache/`, which kernels know nothing of.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisgl.cache.base import Int32Array
from minisgl.cache.prefix import Implementation, make_prefix_cache
from minisgl.kernels.nvrtc import Capability
from minisgl.kernels.spec import KernelSpec, Run, Shape, Version, register
from minisgl.kernels.tuning import Config

PAGE = 16
IMPLEMENTATIONS: dict[str, Implementation] = {"c++": "cpp", "python": "python"}


def radix(
    keys: Tensor,
    queries: Tensor,
    pages: Tensor,
    left: Tensor,
    *,
    version: str | None = None,
    config: Config | None = None,
) -> None:
    """Inserts every key, matches every query, then evicts half of the pages.

    Args:
        keys: [K, P · 16] int32 token ids; page j of key i is number i · P + j. queries: [Q, P · 16] int32.
        pages: [Q, P] int32: the pages matched, -1 behind them.
        left: [2] int64: pages in the tree before the eviction, and after it.
    """
    cache = make_prefix_cache(PAGE, IMPLEMENTATIONS[version] if version else "auto")
    per_key = keys.shape[1] // PAGE
    for i, tokens in enumerate(keys.numpy()):
        cache.insert(tokens, np.arange(i * per_key, (i + 1) * per_key, dtype=np.int32))
    pages.fill_(-1)
    for i, tokens in enumerate(queries.numpy()):
        found = cache.match(tokens).pages
        pages[i, : len(found)] = torch.from_numpy(found)
    left[0] = cache.num_pages
    cache.evict(cache.num_pages // 2)
    left[1] = cache.num_pages
    cache.check_integrity()


def _reference(keys: Tensor, queries: Tensor, pages: Tensor, left: Tensor) -> None:
    """Every prefix in full pages is a key of a dictionary; whoever came first named its last page."""
    known: dict[bytes, int] = {}
    per_key = keys.shape[1] // PAGE
    for i, tokens in enumerate(keys.numpy()):
        for j in range(per_key):
            known.setdefault(tokens[: (j + 1) * PAGE].tobytes(), i * per_key + j)
    pages.fill_(-1)
    for i, tokens in enumerate(queries.numpy()):
        for j in range(per_key):
            page = known.get(tokens[: (j + 1) * PAGE].tobytes())
            if page is None:
                break
            pages[i, j] = page
    left[0], left[1] = len(known), len(known) - len(known) // 2


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    """Token ids of 0 and 1 in pages that often agree: deep shared prefixes, splits, and misses."""
    found = []
    for _ in range(copies):
        size = (shape["tokens"], shape["pages"], PAGE)
        keys, queries = (_paged(size, generator) for _ in range(2))
        pages = torch.empty(shape["tokens"], shape["pages"], dtype=torch.int32)
        found.append((keys, queries, pages, torch.empty(2, dtype=torch.int64)))
    return found


def _paged(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Each page all zeros or all ones but for its last id, so that comparisons must go to its end."""
    body = torch.randint(0, 2, size[:2], generator=generator, dtype=torch.int32)
    ids = body[..., None].expand(size).clone()
    ids[..., -1] = torch.randint(0, 2, size[:2], generator=generator, dtype=torch.int32)
    return ids.flatten(1)


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return 2 * shape["tokens"] * shape["pages"] * PAGE * 4, 0


def _supports(name: str, where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    return "the C++ extension isn't installed" if name == "c++" and not _has_extension() else None


def _has_extension() -> bool:
    return importlib.util.find_spec("minisgl._C") is not None


def _prepare(name: str, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    return partial(radix, version=name)


SPEC = register(
    KernelSpec(
        name="radix",
        run=radix,
        reference=_reference,
        library=_reference,
        versions=tuple(Version(n, "cpu", partial(_supports, n), partial(_prepare, n)) for n in IMPLEMENTATIONS),
        sizes=("tokens", "pages"),
        inputs=_inputs,
        outputs=(2, 3),
        updated=(),
        cost=_cost,
        tolerance={torch.int32: 0.0},
        cases=({"tokens": 1, "pages": 1}, {"tokens": 40, "pages": 6}, {"tokens": 200, "pages": 3}),
        bench=({"tokens": 256, "pages": 24},),
    )
)


# -- the comparison of token ids inside the tree -----------------------------------------------------------------------


def prefix_compare(
    a: Tensor, b: Tensor, out: Tensor, *, version: str | None = None, config: Config | None = None
) -> None:
    """out[i] = how many leading ids `a[i]` and `b[i]` share. a, b: [Q, n] int32; out: [Q] int64.

    `c++` is the tree's own loop, a call from Python each; `python` is NumPy's way.
    """
    if version == "python" or not _has_extension():
        out.copy_(torch.from_numpy(np.array([_agree(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)])))
        return
    from minisgl._C import common_prefix

    for i, (x, y) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        out[i] = common_prefix(x, y)


def _agree(x: Int32Array, y: Int32Array) -> int:
    different = np.flatnonzero(x != y)
    return int(different[0]) if len(different) else len(x)


def _compare_reference(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_((a == b).long().cumprod(-1).sum(-1))


def _compare_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator, copies: int
) -> list[tuple[Any, ...]]:
    """Pairs that agree up to a place of their own: at the start, within a block, at the end, nowhere."""
    count, length = shape["tokens"], shape["ids"]
    found = []
    for _ in range(copies):
        a = torch.randint(0, 150_000, (count, length), generator=generator, dtype=torch.int32)
        b, place = a.clone(), torch.randint(0, length + 1, (count,), generator=generator)
        for i, at in enumerate(place.tolist()):
            b[i, at:] += 1
        found.append((a, b, torch.empty(count, dtype=torch.int64)))
    return found


def _prepare_compare(name: str, device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    return partial(prefix_compare, version=name)


COMPARE = register(
    KernelSpec(
        name="prefix_compare",
        run=prefix_compare,
        reference=_compare_reference,
        library=_compare_reference,
        versions=tuple(Version(n, "cpu", partial(_supports, n), partial(_prepare_compare, n)) for n in IMPLEMENTATIONS),
        sizes=("tokens", "ids"),
        inputs=_compare_inputs,
        outputs=(2,),
        updated=(),
        cost=lambda shape, dtype: (2 * shape["tokens"] * shape["ids"] * 4, 0),
        tolerance={torch.int32: 0.0},
        cases=({"tokens": 50, "ids": 1}, {"tokens": 200, "ids": 64}, {"tokens": 200, "ids": 1000}),
        bench=({"tokens": 64, "ids": 1024},),
    )
)
