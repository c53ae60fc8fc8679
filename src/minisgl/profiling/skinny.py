"""The engine's own matrix products for short steps, switched off and on: what they are worth in whole steps."""

from __future__ import annotations

from minisgl.models.decoder import CausalLM, DecoderLayer
from minisgl.models.layers import VocabTable


def skinny_parts(model: CausalLM) -> list[DecoderLayer | VocabTable]:
    """What of `model` calls `skinny_gemm` where the tuning table says so: layers and the head, of a single rank."""
    parts = (*model.layers, model.lm_head)
    return [part for part in parts if isinstance(part, DecoderLayer | VocabTable) and part.skinny]


def switch(parts: list[DecoderLayer | VocabTable], on: bool) -> None:
    """Lets them, or leaves all products to cuBLAS. Steps that are captured already stay as they are."""
    for part in parts:
        part.skinny = on
