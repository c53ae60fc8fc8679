"""What layers are built with, and where the tensors of a checkpoint go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from minisgl.config import triton_runs
from minisgl.distributed import TPGroup
from minisgl.kernels.cpu import PackedMatrix, PackedRows
from minisgl.models.config import ModelConfig
from minisgl.models.sharding import VocabRange

Weight: TypeAlias = nn.Parameter | PackedMatrix  # of a matrix product


def heads_fit(head_dim: int) -> bool:
    """Whether `qkv_post` takes heads of this size."""
    return head_dim % 8 == 0 and head_dim <= 256


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer of a model is built with."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    tp: TPGroup = TPGroup()
    packed: bool = False  # weights for the CPU kernels
    fused_kernels: bool = False  # CUDA kernels for what lies between the matrix products

    @property
    def fused(self) -> bool:
        """Whether layers call the project's CUDA kernels: where they were asked for and fit."""
        return self.fused_kernels and self.device.type == "cuda" and heads_fit(self.config.head_dim)

    @property
    def triton(self) -> bool:
        """Whether layers may call Triton kernels."""
        on_gpu = self.device.type == "cuda" and triton_runs()
        return on_gpu and torch.cuda.get_device_capability(self.device) >= (8, 0)

    def empty(self, *shape: int) -> nn.Parameter:
        """A parameter without values yet."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def weight(self, rows: int, columns: int) -> Weight:
        """The weight of a matrix product, without values yet."""
        return PackedMatrix(rows, columns) if self.packed else self.empty(rows, columns)

    @property
    def vocab(self) -> VocabRange:
        """This rank's token ids."""
        return VocabRange(self.config.vocab_size, self.tp)

    def kv_heads(self) -> tuple[int, int]:
        """Number and first of this rank's key-value heads; ranks share one where there are fewer heads than ranks."""
        total, tp = self.config.num_kv_heads, self.tp
        count = max(1, total // tp.size)
        return count, tp.rank * total // tp.size


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a checkpoint goes: all of it, or this rank's slice of it along `dim`."""

    target: Tensor | PackedRows  # a view into a parameter, or what stands for one
    shape: tuple[int, ...]  # of the whole tensor
    dim: int = 0
    start: int = 0
    size: int | None = None  # None: the whole

    def slices(self) -> tuple[slice, ...]:
        """This rank's part, as an index into the whole tensor."""
        whole = [slice(None)] * len(self.shape)
        if self.size is not None:
            whole[self.dim] = slice(self.start, self.start + self.size)
        return tuple(whole)

    def put(self, part: Tensor) -> None:
        """Fills the target with `part`, which `slices` chose."""
        self.target.copy_(part)


@runtime_checkable
class Loadable(Protocol):
    """A layer whose parameters come out of a checkpoint."""

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        """Names in the checkpoint and where those tensors go; `path` is the layer's own place in the model."""


def model_places(model: nn.Module) -> dict[str, Place]:
    """Every tensor that the model wants, by its Hugging Face name."""
    found: dict[str, Place] = {}
    for path, module in model.named_modules():
        if isinstance(module, Loadable):
            found.update(module.places(path if path == "lm_head" else f"model.{path}"))
    return found
