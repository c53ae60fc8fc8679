"""minisgl: a compact inference engine for large language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minisgl.types import RequestOutput, SamplingParams, TextDelta

if TYPE_CHECKING:
    from minisgl.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "TextDelta", "__version__"]


def __getattr__(name: str) -> object:
    """`LLM` loads torch, so it is imported when somebody asks for it."""
    if name == "LLM":
        from minisgl.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
