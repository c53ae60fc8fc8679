"""Triton's kernels run under its interpreter where there is no GPU; the switch must be set before they are imported."""

from __future__ import annotations

import os
from typing import Any

import torch


def _fix_loop_bounds() -> None:
    """Triton 3.6's interpreter takes int() of an array of one number for a loop's bounds; NumPy 2.4 forbids that."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    _fix_loop_bounds()
