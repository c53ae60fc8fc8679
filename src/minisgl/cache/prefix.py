"""Choice of the prefix cache's implementation: C++ where the extension was built, plain Python elsewhere."""

from __future__ import annotations

import functools
import logging
from typing import Literal

from minisgl.cache.base import PrefixCache, PrefixMatch
from minisgl.cache.reference import ReferencePrefixCache

__all__ = ["Implementation", "PrefixCache", "PrefixMatch", "make_prefix_cache"]

Implementation = Literal["auto", "cpp", "python"]

logger = logging.getLogger(__name__)


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "the C++ extension isn't built; the prefix cache runs in plain Python, which is slower. "
        "Install a C++20 compiler and the Python headers and reinstall minisgl to get it."
    )


def make_prefix_cache(page_size: int, implementation: Implementation = "auto") -> PrefixCache:
    """An empty prefix cache over pages of `page_size` tokens.

    Raises:
        ValueError: a page size below 1.
        ImportError: 'cpp' was asked for and the extension isn't built.
    """
    if implementation != "python":
        try:
            from minisgl._C import PrefixCache as CppPrefixCache

            return CppPrefixCache(page_size)
        except ImportError:
            if implementation == "cpp":
                raise
            _warn_once()
    return ReferencePrefixCache(page_size)
