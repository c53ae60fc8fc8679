"""Writing GGUF files as llama.cpp converts models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from minisgl.models.gguf import NAMES

Tensors = dict[str, np.ndarray]
BACK = {theirs: ours for ours, theirs in NAMES.items()}


def to_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from halves to rotary pairs."""
    shape = rows.shape
    return rows.reshape(-1, 2, head_dim // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write(path: Path, architecture: str, values: dict[str, Any], tensors: Tensors, kind: str = "F32") -> None:
    """A GGUF file; matrices are quantised to `kind` where their rows divide into its blocks."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    quant = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[quant][0]
    for name, tensor in tensors.items():
        whole = tensor.ndim > 1 and tensor.shape[-1] % block == 0 and kind != "F32"
        data = gguf.quantize(np.ascontiguousarray(tensor), quant) if whole else np.ascontiguousarray(tensor)
        writer.add_tensor(name, data, raw_dtype=quant if whole else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
