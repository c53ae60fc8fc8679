"""Triton's kernels run under its interpreter where there is no GPU; the switch must be set before they are imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
