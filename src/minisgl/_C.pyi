"""The C++ extension (csrc/bindings.cpp)."""

from typing import TypeAlias

from minisgl.cache import base
from minisgl.cache.base import Int32Buffer

def common_prefix(a: Int32Buffer, b: Int32Buffer) -> int: ...
def compare_by(arm: str, a: Int32Buffer, b: Int32Buffer) -> int: ...
def compare_ns(arm: str, size: int, calls: int) -> float: ...
def PrefixCache(page_size: int) -> base.PrefixCache:
    """A class: the radix tree of csrc/radix."""

# The CPU kernels of csrc/cpu; see minisgl.kernels.cpu. Arrays are given as addresses, 0 for none.

Pages: TypeAlias = tuple[int, int, int, int, int, int]
"""Addresses of page_table, seq_lens, query_starts; number of sequences, width of the page table, page size."""

class PackedWeight:
    def __init__(self, columns: int, /) -> None: ...
    @property
    def padded_columns(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def put(self, format: str, source: int, num_bytes: int, first: int, rows: int, /) -> None: ...
    def multiply(self, x: int, stride: int, m: int, bias: int, out: int, out_stride: int, /) -> None: ...
    def gather(self, ids: int, count: int, out: int, out_stride: int, /) -> None: ...

class Decoder:
    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],  # hidden, intermediate, heads, KV heads, head_dim
        norm_eps: float,
        embedding: PackedWeight,
        norm: int,
        /,
    ) -> None: ...
    def add_layer(
        self,
        norms: tuple[int, int, int],  # input, post-attention, heads
        qkv: PackedWeight,
        o: PackedWeight,
        gate_up: PackedWeight,
        down: PackedWeight,
        biases: tuple[int, int, int, int],
        window: int,
        /,
    ) -> None: ...
    # fmt: off
    def forward(
        self, num_tokens: int, num_outputs: int, input_ids: int, cos: int, sin: int, slots: int, output_indices: int,
        pages: Pages, keys: int, values: int, layer_stride: int, hidden: int, marks: int, /,
    ) -> None: ...
    # fmt: on

# fmt: off
def cpu_paged_attention(
    q: int, q_stride: int, out: int, keys: int, values: int, pages: Pages,
    num_heads: int, num_kv_heads: int, head_dim: int, scale: float, window: int, /,
) -> None: ...
def cpu_sample(
    logits: int, stride: int, num_rows: int, vocab_size: int, temperature: int, seeds: int, output_index: int,
    first: int, out: int, best: int, /,
) -> None: ...
# fmt: on
def cpu_threads() -> int: ...
def cpu_set_threads(count: int, /) -> None: ...
def cpu_kernels() -> str: ...
def cpu_available_kernels() -> list[str]: ...
def cpu_select_kernels(name: str, /) -> None: ...
