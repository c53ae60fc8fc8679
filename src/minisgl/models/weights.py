"""Weights from safetensors, tensor by tensor straight into place; and random ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minisgl.models.build import Place, model_places
from minisgl.models.progress import byte_bar
from minisgl.types import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAPPED_BYTES = 32 << 20  # of a file, before it is mapped afresh


def load(model: nn.Module, folder: Path, progress: bool) -> None:
    """Fills `model` from the safetensors files in `folder`. One tensor at a time is in host memory beside the model.

    Raises:
        ModelError: no weights, a file cut short, tensors missing, unexpected or of another shape.
    """
    files = checkpoint_files(folder)
    places = model_places(model)
    tied = "lm_head.weight" not in places
    found: set[str] = set()
    total = sum(file.stat().st_size for file in files)
    with byte_bar(f"Loading {folder.name}", total, progress) as advance:
        for file in files:
            try:
                found |= _load_file(file, places, tied)
            except (SafetensorError, OSError) as e:
                raise ModelError(f"{file} can't be read, it may be cut short: {e}; fetch it again") from e
            advance(file.stat().st_size)
    require_all(places, found, folder)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or those that its index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; other formats aren't read. "
            "With only a config.json there, --dummy-weights runs the model on random weights"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ModelError(f"{index} is no readable index of weights: {e!r}") from e
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {_some(missing)}, which {INDEX} names; fetch the model again")
    return [folder / name for name in names]


def _load_file(file: Path, places: dict[str, Place], tied: bool) -> set[str]:
    """Fills what `file` holds. It is mapped afresh every few tensors: pages once read would else stay with us."""
    with safe_open(file, framework="pt") as f:
        names = [name for name in f.keys() if not _ignored(name, tied)]  # noqa: SIM118 (not a dict)
    if unknown := [name for name in names if name not in places]:
        raise unknown_tensors(unknown, file)
    left = names[::-1]
    while left:
        with safe_open(file, framework="pt") as f:
            num_bytes = 0
            while left and num_bytes < MAPPED_BYTES:
                name = left.pop()
                tensor, place = f.get_slice(name), places[name]
                check_shape(name, tuple(tensor.get_shape()), place, file)
                place.put(tensor[place.slices()])
                # a slice of columns touches all pages of its tensor
                num_bytes += math.prod(place.shape) * place.target.dtype.itemsize
    return set(names)


def _ignored(name: str, tied: bool) -> bool:
    """Tensors that some checkpoints hold and nobody needs: rotary tables, the head where the embedding serves."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def unknown_tensors(names: list[str], where: Path) -> ModelError:
    return ModelError(f"{where} holds tensors that this model has no place for: {_some(names)}")


def check_shape(name: str, shape: tuple[int, ...], place: Place, where: Path) -> None:
    if shape != place.shape:
        raise ModelError(
            f"{where}: tensor {name} has shape {list(shape)}; the configuration makes it {list(place.shape)}"
        )


def require_all(places: dict[str, Place], found: set[str], where: Path) -> None:
    missing = sorted(places.keys() - found)
    if missing:
        raise ModelError(f"{where} lacks tensors that this model needs: {_some(missing)}")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def fill_randomly(model: nn.Module, seed: int) -> None:
    """Small normal weights, norms of 1; drawn on the model's device, the same for the same seed and kind of device.

    Whole tensors are drawn, one at a time, so that a rank's slices are those of the model in one piece.
    """
    places = model_places(model)
    generator = torch.Generator(next(iter(places.values())).target.device).manual_seed(seed)
    for name, place in places.items():
        values = torch.ones(place.shape, dtype=place.target.dtype, device=generator.device)
        values = values if "norm" in name else values.normal_(0.0, 0.02, generator=generator)
        place.put(values[place.slices()])
