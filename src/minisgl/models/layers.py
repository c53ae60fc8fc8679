"""The layers that all families share.

Activations are [T, …]: the tokens of all sequences of a step, one after another. Weights are merged where one input
feeds several projections, so that a layer is few, large matrix products. Under tensor parallelism a rank holds
whole heads, a share of the MLP's inner width and a range of the vocabulary; `Build.tp` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisgl.attention.base import ForwardBatch
from minisgl.distributed import TPGroup
from minisgl.kernels.cpu import PackedMatrix
from minisgl.models.build import Build, Place, Weight
from minisgl.models.rotary import Rotation


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019), with the residual sum before it."""

    def __init__(self, build: Build, size: int) -> None:
        super().__init__()
        self.weight = build.empty(size)
        self.eps = build.config.norm_eps
        self.fused = build.fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of `x + residual`, and that sum itself; `residual` is added to in place."""
        if self.fused:
            return self._forward_fused(x, residual)
        residual = x if residual is None else residual.add_(x)
        return F.rms_norm(residual, self.weight.shape, self.weight, self.eps), residual

    def _forward_fused(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        from minisgl.kernels.rmsnorm.op import add_rmsnorm, rmsnorm

        out = torch.empty_like(x)
        if residual is None:
            rmsnorm(x, self.weight, self.eps, out)
            return out, x
        add_rmsnorm(x, residual, self.weight, self.eps, out)
        return out, residual

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        yield f"{path}.weight", Place(self.weight, tuple(self.weight.shape))


class HeadNorm(nn.Module):
    """RMS norm of each query and each key head (Qwen3): one operation over both, which lie side by side."""

    def __init__(self, build: Build, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = build.empty(num_heads + num_kv_heads, build.config.head_dim)
        self.eps = build.config.norm_eps

    def forward(self, qk: Tensor) -> Tensor:
        """`qk` [T, num_heads + num_kv_heads, head_dim], normed."""
        return F.rms_norm(qk, qk.shape[-1:], None, self.eps) * self.weight

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        parent, shape = path.rpartition(".")[0], (self.weight.shape[1],)
        yield f"{parent}.q_norm.weight", Place(self.weight[: self.num_heads], shape)
        yield f"{parent}.k_norm.weight", Place(self.weight[self.num_heads :], shape)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return weight.linear(x, bias) if isinstance(weight, PackedMatrix) else F.linear(x, weight, bias)


def skinny_product(
    x: Tensor, weight: Weight, norm: RMSNorm | None = None, gated: bool = False, add_to: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """norm(x) · weightᵀ for few rows of x, by our kernel where it is known to beat cuBLAS; else None, nothing done.

    gated: gate rows, then up rows; silu(gate) · up comes back. add_to: the product is added to it, and it comes back.
    """
    from minisgl.kernels.skinny_gemm.op import skinny_gemm, tuned

    assert isinstance(weight, Tensor)
    config = tuned(x, weight, norm is not None, gated, add_to is not None)
    if config is None:
        return None
    out = x.new_empty(x.shape[0], weight.shape[0] // (1 + gated)) if add_to is None else add_to
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    skinny_gemm(x, weight, out, gain, eps, gated, add_to is not None, config=config)
    return out


def summand(tp: TPGroup, x: Tensor, width: int) -> Tensor:
    """Memory [T, width] for a rank's part of a sum over the ranks, such that adding it up needs no copy if possible.

    The next call may give the same memory: whoever needs the sum for longer copies it.
    """
    out = tp.workspace((x.shape[0], width), x.dtype)
    return x.new_empty(x.shape[0], width) if out is None else out


@dataclass(frozen=True, slots=True)
class Part:
    """One projection in a merged weight: its name and rows in the checkpoint, and this rank's range of them."""

    name: str
    rows: int
    start: int
    size: int


class ColumnLinear(nn.Module):
    """Projections of one input, merged: ranks split the output, `[T, in] → [T, sum of the parts' sizes]`."""

    def __init__(self, build: Build, in_size: int, parts: Sequence[Part], bias: bool) -> None:
        super().__init__()
        self.parts = tuple(parts)
        out_size = sum(part.size for part in parts)
        self.weight = build.weight(out_size, in_size)
        self.bias = build.empty(out_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        parent, row = path.rpartition(".")[0], 0
        for part in self.parts:
            rows = slice(row, row + part.size)
            shape = (part.rows, self.weight.shape[1])
            yield f"{parent}.{part.name}.weight", Place(self.weight[rows], shape, 0, part.start, part.size)
            if self.bias is not None:
                yield f"{parent}.{part.name}.bias", Place(self.bias[rows], shape[:1], 0, part.start, part.size)
            row += part.size


class RowLinear(nn.Module):
    """A projection whose input the ranks split, `[T, in of this rank] → [T, out]`, summed over the ranks."""

    def __init__(self, build: Build, in_size: int, out_size: int, bias: bool, start: int, size: int) -> None:
        super().__init__()
        self.tp, self.start, self.in_size = build.tp, start, in_size
        self.weight = build.weight(out_size, size)
        self.bias = build.empty(out_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return linear(x, self.weight, self.bias)
        out = self.tp.all_reduce(self._product(x))
        return out if self.bias is None else out + self.bias

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, PackedMatrix):
            return self.weight.linear(x)
        return torch.mm(x, self.weight.t(), out=summand(self.tp, x, self.weight.shape[0]))

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        out_size, size = self.weight.shape
        yield f"{path}.weight", Place(self.weight[:], (out_size, self.in_size), 1, self.start, size)
        if self.bias is not None:
            yield f"{path}.bias", Place(self.bias, (out_size,))


class VocabTable(nn.Module):
    """A row a token id: the embedding, the head, or both where a model ties them.

    Ranks hold equal ranges of ids; rows of zeros fill them up where the vocabulary doesn't divide.
    """

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.vocab, self.fused, self.skinny = build.vocab, build.fused, build.fused
        rows, size = self.vocab.rows, self.vocab.size
        self.weight = build.weight(rows, build.config.hidden_size)
        if size < rows:
            self.weight[size:].copy_(torch.zeros(rows - size, self.weight.shape[1]))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [T] → their rows [T, hidden_size]; each rank looks up its own, and the sum has them all."""
        vocab, weight = self.vocab, self.weight
        if self.fused:
            assert isinstance(weight, Tensor)
            return vocab.tp.all_reduce(self._embed_fused(ids, weight))
        if vocab.whole:
            return self._embed(ids)
        places = vocab.local(ids)
        rows = self._embed(places.clamp(max=vocab.rows - 1))
        return vocab.tp.all_reduce(rows.masked_fill_((places == vocab.rows).unsqueeze(-1), 0))

    def _embed(self, places: Tensor) -> Tensor:
        return self.weight.embed(places) if isinstance(self.weight, PackedMatrix) else F.embedding(places, self.weight)

    def _embed_fused(self, ids: Tensor, weight: Tensor) -> Tensor:
        from minisgl.kernels.index.op import index

        rows = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype, device=ids.device)
        index(rows, weight, ids, self.vocab.start, self.vocab.size)
        return rows

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [R, hidden_size] → logits [R, rows] of this rank's ids, -inf where a row stands for none."""
        logits = skinny_product(x, self.weight) if self.skinny else None
        if logits is None:
            logits = linear(x, self.weight)
        if self.vocab.size < self.vocab.rows:
            logits[:, self.vocab.size :] = float("-inf")
        return logits

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        vocab = self.vocab
        shape = (vocab.vocab_size, self.weight.shape[1])
        start = min(vocab.start, vocab.vocab_size)
        yield f"{path}.weight", Place(self.weight[: vocab.size], shape, 0, start, vocab.size)


class Attention(nn.Module):
    """Grouped-query self-attention over the paged pool."""

    def __init__(self, build: Build, layer: int, head_norm: bool = False) -> None:
        super().__init__()
        config, tp = build.config, build.tp
        self.layer, self.head_dim = layer, config.head_dim
        self.num_heads = tp.shard(config.num_heads, "attention heads")
        self.num_kv_heads, first_kv = build.kv_heads()
        self.scale = config.head_dim**-0.5
        self.window = config.windows[layer]
        start, size = tp.rank * self.num_heads * self.head_dim, self.num_heads * self.head_dim
        kv = (config.num_kv_heads * self.head_dim, first_kv * self.head_dim, self.num_kv_heads * self.head_dim)
        q_rows = config.num_heads * self.head_dim
        parts = (Part("q_proj", q_rows, start, size), Part("k_proj", *kv), Part("v_proj", *kv))
        self.qkv_proj = ColumnLinear(build, config.hidden_size, parts, config.qkv_bias)
        self.head_norm = HeadNorm(build, self.num_heads, self.num_kv_heads) if head_norm else None
        self.o_proj = RowLinear(build, q_rows, config.hidden_size, config.o_bias, start, size)

    def forward(self, x: Tensor, rotation: Rotation | Tensor, batch: ForwardBatch) -> Tensor:
        """`x` [T, hidden_size] → [T, hidden_size]; this step's keys and values go into the pool first."""
        return self.o_proj(self.attend(self.qkv_proj(x), rotation, batch))  # type: ignore[no-any-return]

    def attend(self, qkv: Tensor, rotation: Rotation | Tensor, batch: ForwardBatch) -> Tensor:
        """What lies between the projections."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        if isinstance(rotation, Rotation):
            q = self._rotate_and_store(heads, rotation, batch)
        else:
            q = self._rotate_and_store_fused(heads, rotation, batch)
        out = batch.attention.forward(q, self.layer, batch, self.scale, self.window)
        return out.view(qkv.shape[0], -1)

    def _rotate_and_store(self, heads: Tensor, rotation: Rotation, batch: ForwardBatch) -> Tensor:
        num_qk = self.num_heads + self.num_kv_heads
        qk, v = heads[:, :num_qk], heads[:, num_qk:]
        if self.head_norm is not None:
            qk = self.head_norm(qk)
        qk = rotation.apply(qk)
        batch.pool.store(self.layer, qk[:, self.num_heads :], v, batch.slots)
        return qk[:, : self.num_heads]

    def _rotate_and_store_fused(self, heads: Tensor, table: Tensor, batch: ForwardBatch) -> Tensor:
        """The same in one launch, the queries rotated where they are."""
        from minisgl.kernels.qkv_post.op import qkv_post

        norm = self.head_norm
        q_weight, k_weight = (norm.weight[0], norm.weight[self.num_heads]) if norm is not None else (None, None)
        eps = norm.eps if norm is not None else 0.0
        keys, values = batch.pool.slots(self.layer)
        scales = batch.pool.scales(self.layer)
        place = table, batch.positions, keys, values, batch.slots, None
        qkv_post(heads.flatten(1), q_weight, k_weight, eps, *place, *scales)
        return heads[:, : self.num_heads]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config, tp = build.config, build.tp
        total = config.intermediate_size
        share = tp.shard(total, "columns of the MLP")
        start = tp.rank * share
        parts = [Part(name, total, start, share) for name in ("gate_proj", "up_proj")]
        self.fused = build.fused
        self.gate_up_proj = ColumnLinear(build, config.hidden_size, parts, config.mlp_bias)
        self.down_proj = RowLinear(build, total, config.hidden_size, config.mlp_bias, start, share)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.gate_up_proj(x)))  # type: ignore[no-any-return]

    def activate(self, gate_up: Tensor) -> Tensor:
        if not self.fused:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)
        from minisgl.kernels.silu_mul.op import silu_mul

        silu_mul(gate_up, out := gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2))
        return out
