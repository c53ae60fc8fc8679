"""store: keys and values of this step's tokens into their slots of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.kernels import check
from minisgl.kernels.nvrtc import ID_CTYPES, Build, prepare
from minisgl.kernels.spec import Kernel, Run, Shape, Version, by_layout, fits, launcher, nothing, register
from minisgl.kernels.tuning import Config


def store(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, version: str | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Writes `k[t]` and `v[t]` to slot `slots[t]` of the caches; a slot of -1 (or any out of range) writes nothing.

    Args:
        k_cache, v_cache: [slots, Hkv, D], any dtype; a slot's [Hkv, D] contiguous.
        k, v: [T, Hkv, D], the caches' dtype; a token's [Hkv, D] contiguous, as in slices of a fused QKV output.
        slots: [T] int32 or int64, contiguous. No slot may occur twice.

    Raises:
        KernelError: an argument of the wrong shape, dtype, layout or device; it names the argument.
    """
    _plan((k_cache, v_cache, k, v, slots), version, config)(k_cache, v_cache, k, v, slots)


@by_layout
def _plan(tensors: tuple[Tensor, ...], version: str | None, config: Config | None) -> Run:
    k_cache, v_cache, k, v, slots = tensors
    check_arguments(k_cache, v_cache, k, v, slots)
    device = check.cuda(k_cache=k_cache, v_cache=v_cache, k=k, v=v, slots=slots)
    if not k.numel():
        return nothing
    size, tokens, num_slots = k.element_size(), k.shape[0], k_cache.shape[0]
    strides = [x.stride(0) * size for x in tensors[:4]]
    vec = check.vector_bytes(*strides, *(x.data_ptr() for x in tensors[:4]), k.shape[1] * k.shape[2] * size)
    start = launcher("store", device, k.dtype, version, config, *k.shape, vec, slots.element_size())
    kc, vc, ks, vs = strides

    def run(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        caches = k_cache.data_ptr(), kc, v_cache.data_ptr(), vc
        start(*caches, k.data_ptr(), ks, v.data_ptr(), vs, slots.data_ptr(), num_slots, tokens)

    return run


def check_arguments(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Checks all but the device."""
    check.dims("k_cache", k_cache, 3, "[slots, Hkv, D]")
    check.dims("slots", slots, 1, "[T]")
    check.dtype("slots", slots, check.IDS)
    check.contiguous("slots", slots)
    check.rows("k_cache", k_cache)
    expected = (slots.shape[0], k_cache.shape[1], k_cache.shape[2])
    for name, x, shape in (("v_cache", v_cache, tuple(k_cache.shape)), ("k", k, expected), ("v", v, expected)):
        check.shape(name, x, shape)
        check.dtype(name, x, (k_cache.dtype,))
        check.rows(name, x)


def row_bytes_of(dtype: torch.dtype, shape: Shape) -> int:
    return shape["heads"] * shape["head_dim"] * dtype.itemsize


def build_for(version: str, row_bytes: int, vec: int, id_bytes: int, **macros: int) -> Build:
    """The build of the source of `version`, which lies in the ladder unless it is the one that the engine runs."""
    macros |= {"ROW_BYTES": row_bytes, "VEC": vec}
    source = f"store/{'' if version == 'v2' else 'ladder/'}store_{version}.cu"
    return Build.of(source, f"store_{version}", ID_T=ID_CTYPES[id_bytes], **macros)


def _v2(device: int, dtype: torch.dtype, shape: Shape, config: Config) -> Run:
    row_bytes = row_bytes_of(dtype, shape)
    lanes, work, pieces = check.split_row(row_bytes // shape["vec"], config.work)
    build = build_for("v2", row_bytes, shape["vec"], shape["id_bytes"], LANES=lanes, WORK=work)
    blocks = check.num_blocks(shape["tokens"] * 2 * pieces * lanes, config.threads)
    return prepare(build, device, blocks, config.threads, config.pdl)


def _cost(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return shape["tokens"] * (4 * row_bytes_of(dtype, shape) + shape.get("id_bytes", 8)), 0


_SIZES = ("tokens", "heads", "head_dim", "vec", "id_bytes")
KERNEL = register(Kernel("store", (Version("v2", "cuda", fits, _v2),), _SIZES, _cost))
