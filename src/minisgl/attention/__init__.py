"""Attention backends behind one interface (`base.AttentionBackend`)."""

from __future__ import annotations

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.types import ConfigError

__all__ = ["AttentionBackend", "ForwardBatch", "make_attention"]


def make_attention(name: str) -> AttentionBackend:
    """The backend called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    from minisgl.attention.torch_sdpa import TorchSDPA

    backends: dict[str, type[AttentionBackend]] = {TorchSDPA.name: TorchSDPA}
    if name not in backends:
        raise ConfigError(f"attention is {name!r}; expected auto or one of: {', '.join(sorted(backends))}")
    return backends[name]()
