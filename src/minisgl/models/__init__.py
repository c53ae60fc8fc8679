"""Models: from a name to logits.

`hub.resolve_model` finds or fetches the files and needs no torch; `load_model` builds the model and loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisgl.models.config import ModelConfig
    from minisgl.models.decoder import CausalLM
    from minisgl.models.registry import load_model

__all__ = ["CausalLM", "ModelConfig", "load_model"]


def __getattr__(name: str) -> object:
    """These need torch, which takes seconds to import: only who asks for one pays."""
    if name == "ModelConfig":
        from minisgl.models.config import ModelConfig

        return ModelConfig
    if name in ("CausalLM", "load_model"):
        from minisgl.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
