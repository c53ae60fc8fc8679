"""Rotary position embedding (Su et al. 2021) and its stretched variants. Frequencies are float32 and computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisgl.models.config import ModelConfig, RopeScaling


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosine and sine of one step's positions: all layers share them."""

    cos: Tensor  # [T, 1, head_dim] float32
    sin: Tensor  # the same, its first half negated

    def apply(self, x: Tensor) -> Tensor:
        """`x` [T, heads, head_dim] rotated, element i of a head paired with i + head_dim / 2; x's dtype."""
        swapped = x.roll(x.shape[-1] // 2, dims=-1)
        return (x * self.cos).addcmul_(swapped, self.sin).to(x.dtype)


class Rotary(nn.Module):
    """Positions → `Rotation`, computed afresh each step; or, for kernels that look angles up, one table for all."""

    def __init__(self, config: ModelConfig, device: torch.device, with_table: bool = False) -> None:
        super().__init__()
        frequencies = scaled_frequencies(config)
        self.frequencies = frequencies.to(device)  # [head_dim / 2]
        scaling = config.rope_scaling
        self.attention_factor = scaling.attention_factor if scaling is not None else 1.0
        self.table: Tensor | None = None  # [max_position, head_dim] float32: cosines, then sines
        if with_table:
            self.table = torch.cat(self._angles(torch.arange(config.max_position, device=device)), -1)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.to(torch.float32).unsqueeze(-1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos, sin

    def forward(self, positions: Tensor) -> Rotation | Tensor:
        """`positions` [T] of any integer dtype. Where there is a table, it is what comes back."""
        if self.table is not None:
            return self.table
        cos, sin = self._angles(positions)
        return Rotation(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))


def scaled_frequencies(config: ModelConfig) -> Tensor:
    """Angle a position, for each pair of a head's elements: [head_dim / 2] float32 on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, config)
    assert scaling.kind == "factors"
    return frequencies / torch.tensor(scaling.factors, dtype=torch.float32)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: slow frequencies are divided, fast ones kept, those between blended by their turns in the context."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): as Llama 3.1's, with a ramp that is linear in the pair's index."""

    def pair_that_turns(times: float) -> float:
        context = scaling.original_max_position
        return config.head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(len(frequencies), dtype=torch.float32) - low) / max(high - low, 0.001)
    stretch = ramp.clamp(0, 1)
    return stretch * frequencies / scaling.factor + (1 - stretch) * frequencies
