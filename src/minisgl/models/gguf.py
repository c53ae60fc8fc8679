"""Models in GGUF files: their shape from the metadata, their weights dequantised tensor by tensor."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs

from minisgl.gguf_file import GGUFFile, GGUFTensor
from minisgl.kernels.cpu import GGUF_FORMATS, PackedRows
from minisgl.models.build import Place, model_places
from minisgl.models.config import ModelConfig, RopeScaling, Values, check, yarn_mscale
from minisgl.models.decoder import CausalLM
from minisgl.models.progress import byte_bar
from minisgl.models.weights import check_shape, require_all, unknown_tensors
from minisgl.types import ModelError

ROPE_FACTORS = "rope_freqs.weight"
NAMES: dict[str, str] = tomllib.loads(Path(__file__).with_name("gguf_names.toml").read_text(encoding="utf-8"))


# -- the model's shape ------------------------------------------------------------------------------------------------


def read_config(file: GGUFFile, families: Mapping[str, type[CausalLM]]) -> ModelConfig:
    """The shape of the model in `file`; `families` by their GGUF architecture.

    Raises:
        ModelError: an architecture or feature that isn't supported, or metadata that is missing or makes no sense.
    """
    architecture = Values(file.metadata, file.path).text("general.architecture")
    if architecture not in families:
        raise ModelError(
            f"{file.path}: general.architecture is {architecture!r}, which isn't supported; "
            f"supported: {', '.join(families)}"
        )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    values = Values(own, file.path, prefix)
    family = families[architecture]
    fields = _fields(file, values) | family.read_gguf_fields(values)
    config = ModelConfig(family=family.family, **fields)
    if values.has("expert_count") and values.integer("expert_count", low=0) and config.moe is None:
        raise values.error("expert_count", f"is set: a mixture of experts isn't supported for {architecture}")
    return check(config, file.path)


def _fields(file: GGUFFile, values: Values) -> dict[str, Any]:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} lacks the tensor token_embd.weight")
    hidden, heads = values.integer("embedding_length"), values.integer("attention.head_count")
    head_dim = values.integer("attention.key_length", max(hidden // heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if values.integer(key, head_dim) != head_dim:
            raise values.error(key, f"differs from the head size {head_dim}, which isn't supported")
    num_layers = values.integer("block_count")
    window = values.integer("attention.sliding_window", 0, low=0) or None
    return {
        "vocab_size": embedding.shape[0], "hidden_size": hidden, "num_layers": num_layers,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_heads": heads, "num_kv_heads": values.integer("attention.head_count_kv", heads), "head_dim": head_dim,
        "max_position": values.integer("context_length"),
        "norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, values),
        "tie_embeddings": "output.weight" not in file.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "windows": (window,) * num_layers,
    }  # fmt: skip


def _rope_scaling(file: GGUFFile, values: Values) -> RopeScaling | None:
    if ROPE_FACTORS in file.tensors:
        factors = dequantise(file.path, file.tensors[ROPE_FACTORS])
        return RopeScaling("factors", factors=tuple(factors.reshape(-1).tolist()))
    kind = values.text("rope.scaling.type", "none")
    if kind == "none":
        legacy = values.number("rope.scale_linear", 1.0)
        return None if legacy == 1 else RopeScaling("linear", legacy)
    if kind not in ("linear", "yarn"):
        raise values.error("rope.scaling.type", f"is {kind!r}, which isn't supported; supported: none, linear, yarn")
    factor = values.number("rope.scaling.factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    return RopeScaling(
        "yarn", factor, values.integer("rope.scaling.original_context_length", values.integer("context_length")),
        beta_fast=values.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=values.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=values.number("rope.scaling.attn_factor", 1.0) * yarn_mscale(factor),
    )  # fmt: skip


# -- the weights ------------------------------------------------------------------------------------------------------


def load(model: CausalLM, file: GGUFFile, progress: bool) -> None:
    """Fills `model` from `file`. One tensor at a time is mapped, and dequantised beside the model.

    Raises:
        ModelError: tensors missing, unexpected, of another shape, or of a type that gguf can't dequantise.
    """
    places, path = model_places(model), Path(file.path)
    found: set[str] = set()
    tensors = [tensor for tensor in file.tensors.values() if tensor.name != ROPE_FACTORS]
    with byte_bar(f"Loading {path.name}", sum(t.num_bytes for t in tensors), progress) as advance:
        for tensor in tensors:
            for name, part in _pieces(tensor):
                if name not in places:
                    raise unknown_tensors([tensor.name], path)
                check_shape(tensor.name, part.shape, places[name], path)
                split = model.gguf_interleaved and re.search(r"[qk]_proj", name)
                put(places[name], file.path, part, model.config.head_dim if split else None)
                found.add(name)
            advance(tensor.num_bytes)
    require_all(places, found, path)


def put(place: Place, path: str, tensor: GGUFTensor, pairs_of: int | None) -> None:
    """Puts a tensor where it goes: as the blocks that it is in the file, or its values.

    Args:
        pairs_of: the size of heads whose rows lie as rotary pairs, None if they don't.
    """
    if place.size == 0:  # a rank whose range of the vocabulary lies beyond its end
        return
    target, part = place.target, _blocks(path, tensor, place)
    in_blocks = isinstance(target, PackedRows) and tensor.type in GGUF_FORMATS and part.whole
    rows = torch.from_numpy(np.array(part.data) if in_blocks else part.values())
    if pairs_of is not None:
        rows = _split_pairs(rows, pairs_of)
    if not isinstance(target, PackedRows):
        place.put(rows)
    elif in_blocks:
        target.put(tensor.type.lower(), rows)
    else:  # half precision is far finer than the blocks that these values come from, unless those are packed elsewhere
        exact = tensor.type in ("F32", "F16", "BF16", *GGUF_FORMATS)
        target.copy_(rows if exact else rows.half())


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Rows of a tensor as the blocks that hold some of its columns."""

    path: str
    tensor: GGUFTensor
    data: np.ndarray  # uint8 [rows, bytes], in the file
    columns: slice | None  # of the values in these blocks; None: the tensor is a vector

    whole: bool  # the blocks hold these columns and no others

    def values(self) -> np.ndarray:
        """float32 [rows, columns], or [rows] of a vector."""
        values = _dequantise(self.path, self.tensor, self.data)
        return np.require(values[:, 0] if self.columns is None else values[:, self.columns], np.float32, ["C", "W"])


def _blocks(path: str, tensor: GGUFTensor, place: Place) -> _Blocks:
    """The part of a tensor that goes to `place`: nothing else is read, but for what shares a block with it."""
    import gguf

    data, (rows, *columns) = _bytes(path, tensor), place.slices()
    if not columns:
        return _Blocks(path, tensor, data[rows], None, True)
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]]
    start, stop, _ = columns[0].indices(tensor.shape[1])
    first, last = start // size, -(-stop // size)
    data = data[rows, first * num_bytes : last * num_bytes]
    inside = slice(start - first * size, stop - first * size)
    return _Blocks(path, tensor, data, inside, start % size == stop % size == 0)


def _bytes(path: str, tensor: GGUFTensor) -> np.ndarray:
    """The bytes of a tensor of the file at `path`, mapped: uint8 [rows, bytes a row]."""
    try:
        return np.memmap(path, np.uint8, "r", tensor.offset, (tensor.num_bytes,)).reshape(tensor.shape[0], -1)
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: tensor {tensor.name} can't be read: {e}") from e


def _pieces(tensor: GGUFTensor) -> Iterator[tuple[str, GGUFTensor]]:
    """A tensor under its Hugging Face name; the experts of a stacked one apart. An unknown name stays as it is."""
    name = _translate(tensor.name)
    if "{}" not in name:
        yield name, tensor
        return
    num_experts, size = tensor.shape[0], tensor.num_bytes // tensor.shape[0]
    for i in range(num_experts):
        part = structs.replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + i * size, num_bytes=size)
        yield name.format(i), part


def _translate(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        return name
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def dequantise(path: str, tensor: GGUFTensor) -> np.ndarray:
    """The values of a tensor of the file at `path`: float32 in the tensor's shape."""
    return _dequantise(path, tensor, _bytes(path, tensor)).reshape(tensor.shape)


def _dequantise(path: str, tensor: GGUFTensor, data: np.ndarray) -> np.ndarray:
    """The values [rows, …] of blocks [rows, bytes] of a tensor."""
    import gguf

    try:
        values: np.ndarray = gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.type])
    except NotImplementedError as e:
        raise ModelError(f"tensor {tensor.name} is of type {tensor.type}, which the gguf package can't read") from e
    except ValueError as e:
        raise ModelError(f"{path}: tensor {tensor.name} can't be read: {e}") from e
    return values


def _split_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head in Hugging Face's order, halves (i, i + head_dim / 2), from rotary pairs (2i, 2i + 1)."""
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
