"""Triton's kernels run under its interpreter where there is no GPU."""

from __future__ import annotations

import interpreter  # noqa: F401 (it sets the switch)
