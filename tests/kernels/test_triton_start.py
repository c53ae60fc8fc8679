"""Triton's cache is named by its library's version, size and time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import triton
from triton._C import libtriton
from triton.runtime import cache

from minisgl.kernels.triton_start import spare_hash


def test_spare_hash_names_the_cache_by_version_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "triton_key", cache.triton_key)  # put back afterwards
    library = tmp_path / "libtriton.so"
    monkeypatch.setattr(libtriton, "__file__", str(library))

    def key(content: bytes, time: int) -> str:
        library.write_bytes(content)
        os.utime(library, ns=(time, time))
        spare_hash()
        return cache.triton_key()

    keys = [key(b"one", 1), key(b"one", 2), key(b"other", 2)]
    assert len(set(keys)) == 3 and all(triton.__version__ in k for k in keys)
    assert key(b"one", 1) == keys[0]


def test_spare_hash_leaves_another_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cache, "triton_key")
    spare_hash()
    assert not hasattr(cache, "triton_key")
