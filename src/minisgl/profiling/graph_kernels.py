"""Which operator a kernel of a CUDA graph belongs to, by its name and by what runs before and after it.

A graph is launched as a whole, so that the spans around its kernels' launch end at the graph. But a layer's operators
always come in the same order, and between two products lies a kernel that tells its name: QK-norm, rotation and store,
then attention, then the products O, gate/up and down, then the next layer's QKV or the LM head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from minisgl.profiling.spans import Span

_NAMED = {
    "embedding": r"index_v\d",
    "rmsnorm": r"rmsnorm",
    "rope+store": r"qkv_post",
    "attention": r"_(prefill|decode|combine)$",
    "silu*mul": r"silu_mul",
    "experts": r"_(route|product|sum)$",
    "sample": r"_(sample_blocks|best_block)$",
    "product": r"nvjet|gemm|gemv|cutlass|cublas|splitK",
}
_PATTERNS = [(name, re.compile(pattern)) for name, pattern in _NAMED.items()]
_PART = re.compile(r"splitK\w*reduce")  # of the product before it
_AFTER_ATTENTION = ("o", "gate/up", "down")
_OF_LAYER = {"qkv", "rope+store", "attention", *_AFTER_ATTENTION, "silu*mul", "router", "experts"}
OTHER = "inputs"
_LAUNCH = ("forward", "decode", "prefill", "step", "layers")  # a path that ends in one of these names no operator


def name_graph_kernels(spans: Iterable[Span]) -> list[Span]:
    """The spans by start; kernels of graphs get their layer and operator as the end of their path, others OTHER."""
    ordered = sorted(spans, key=lambda s: s.start)
    places = [i for i, s in enumerate(ordered) if s.process == "gpu" and _of_graph(s)]
    for i, path in zip(places, _paths([ordered[i].name for i in places]), strict=True):
        ordered[i] = replace(ordered[i], path=(*ordered[i].path, *path))
    return ordered


def _of_graph(kernel: Span) -> bool:
    return not kernel.path or kernel.path[-1].split()[0] in _LAUNCH


def _paths(names: Sequence[str]) -> list[tuple[str, ...]]:
    """What to append to the paths of kernels with these names, one after another."""
    kinds = [next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "") for name in names]
    found: list[tuple[str, ...]] = []
    layer, products, last = -1, len(_AFTER_ATTENTION), ""
    for i, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        if kind == "embedding":
            layer, products = -1, len(_AFTER_ATTENTION)
        elif kind == "attention":
            products = 0
        elif kind == "experts":
            products = len(_AFTER_ATTENTION)
        elif kind == "product" and _PART.search(name):
            kind = last
        elif kind == "product":
            kind = last = _product(products, kinds[i:])
            products += 1
        if kind == "qkv" and not (found and found[-1][-1:] == ("qkv",)):
            layer += 1
        inside = layer >= 0 and kind in _OF_LAYER
        found.append((f"layer {layer}", kind) if inside else (kind or OTHER,))
    return found


def _product(since_attention: int, following: Sequence[str]) -> str:
    """A product's name. following: kinds of kernels from this one on."""
    if since_attention < len(_AFTER_ATTENTION):
        name = _AFTER_ATTENTION[since_attention]
        ahead = next((kind for kind in following[1:] if kind in ("experts", "rope+store", "embedding")), "")
        return "router" if name == "gate/up" and ahead == "experts" else name
    ahead = next((kind for kind in following if kind in ("rope+store", "embedding", "sample")), "")
    return "qkv" if ahead == "rope+store" else "lm head"
