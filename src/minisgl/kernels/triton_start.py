"""What a process's first Triton kernel needn't wait for."""

from __future__ import annotations

import os

import triton
from triton._C import libtriton
from triton.runtime import cache


def spare_hash() -> None:
    """Keeps Triton from reading the whole of its library, 400 MB, when a process launches its first kernel.

    It hashes it to name what its cache on disk holds; version, size and time of the file tell builds apart as well.
    Where Triton is built otherwise than we know it, everything stays as it is.
    """
    if hasattr(cache, "triton_key"):
        file = os.stat(libtriton.__file__)
        key = f"{triton.__version__}-{file.st_size}-{file.st_mtime_ns}"
        setattr(cache, "triton_key", lambda: key)  # noqa: B010  what mypy thinks of assigning it depends on Triton
