"""The KV pool: the tensors that hold keys and values, and the geometry of their pages."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest finite value


class KVPool:
    """Keys and values of every layer, in pages.

    Layout per layer: `[num_pages + 1, page_size, num_kv_heads, head_dim]`. A `slot` is page × page_size + offset.
    The last page is a dummy: padding rows write there and nobody reads it. One group of layers that share geometry.

    Where `dtype` is FP8 (e4m3), what is held is key / k_scale and value / v_scale of the layer and KV head.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, num_pages: int, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.page_size = page_size
        self.num_pages = num_pages
        shape = (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
        # Zeros, since attention may multiply what lies behind a sequence's end by a weight of 0: it mustn't be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.quantised = dtype == FP8
        self.k_scale, self.v_scale = torch.ones(2, num_layers, num_kv_heads, device=device)  # float32

    def set_scales(self, k_scale: Tensor, v_scale: Tensor) -> None:
        """Fixes what keys and values are divided by, [num_layers, num_kv_heads] each, before any is stored."""
        self.k_scale.copy_(k_scale)
        self.v_scale.copy_(v_scale)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return 2 * self.k[:, 0].numel() * self.k.element_size()

    @property
    def dummy_page(self) -> int:
        return self.num_pages

    @property
    def num_tokens(self) -> int:
        """Tokens that fit, the dummy page apart."""
        return self.num_pages * self.page_size

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer by slot: two views `[slots, num_kv_heads, head_dim]`."""
        return self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """What keys and values of the layer were divided by, [num_kv_heads] each; None where nothing is quantised."""
        return (self.k_scale[layer], self.v_scale[layer]) if self.quantised else (None, None)

    def store(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Writes `k`, `v` [T, num_kv_heads, head_dim] (any strides) to `slots` [T] int64 of the layer."""
        for cache, x, scale in zip(self.slots(layer), (k, v), (self.k_scale, self.v_scale), strict=True):
            if self.quantised:  # as bytes: index_copy_ knows no float8
                x = (x / scale[layer, :, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
                cache = cache.view(torch.uint8)
            cache.index_copy_(0, slots, x)
