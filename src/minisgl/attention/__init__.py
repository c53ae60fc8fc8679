"""Attention backends behind one interface (`base.AttentionBackend`)."""

from __future__ import annotations

import importlib.util

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.types import ConfigError

__all__ = ["NAMES", "AttentionBackend", "ForwardBatch", "make_attention"]

NAMES = ("torch_sdpa", "cpu", "triton", "flashinfer")


def make_attention(name: str) -> AttentionBackend:
    """The backend called `name`.

    Raises:
        ConfigError: there is none of that name, or this machine lacks what it needs.
    """
    if name == "torch_sdpa":
        from minisgl.attention.torch_sdpa import TorchSDPA

        return TorchSDPA()
    if name == "cpu":
        from minisgl.attention.cpu_paged import CpuPaged

        return CpuPaged()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("attention triton needs the package triton; pip install triton, or use torch_sdpa")
        from minisgl.attention.triton_paged import TritonPaged

        return TritonPaged()
    if name == "flashinfer":
        if importlib.util.find_spec("flashinfer") is None:
            raise ConfigError("attention flashinfer needs its package: pip install 'minisgl[flashinfer]', or use auto")
        from minisgl.attention.flashinfer import FlashInfer

        return FlashInfer()
    raise ConfigError(f"attention is {name!r}; expected auto or one of: {', '.join(NAMES)}")
