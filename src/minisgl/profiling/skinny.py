"""An experiment: decoder layers whose matrix products are `skinny_gemm`, fused with the norms, SiLU·mul and residuals.

`install` changes a model that is built already, for steps of up to 64 tokens: a layer is then QKV with the norm before
it, rotation and store, attention, O with the addition, gate/up with norm and SiLU·mul, down with the addition. Whatever
`Choices` gives to cuBLAS runs as it does without. `benchmarks/bench_engine.py --skinny-gemm` measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from minisgl.attention import ForwardBatch
from minisgl.kernels.silu_mul.op import silu_mul
from minisgl.kernels.skinny_gemm import ladder
from minisgl.kernels.spec import registry
from minisgl.kernels.tuning import Config
from minisgl.models.build import Weight
from minisgl.models.decoder import CausalLM, DecoderLayer
from minisgl.models.layers import MLP, Attention, RMSNorm
from minisgl.models.rotary import Rotation

DEFAULT = Config(threads=256, work=1)


@dataclass(frozen=True, slots=True)
class Choices:
    """Configurations by (rows of the weight, columns, batch): of the nearest batch that was measured.

    `measured` maps to None where cuBLAS won. A weight that nobody measured gets `default`.
    """

    measured: Mapping[tuple[int, int, int], Config | None] = field(default_factory=dict)
    default: Config | None = DEFAULT

    @staticmethod
    def read(path: Path) -> Choices:
        """The best of each product in the last line of `path`, as benchmarks/bench_gemm.py writes it."""
        record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        found: dict[tuple[int, int, int], Config | None] = {}
        for row in record["rows"]:
            # `cublas` alone lacks the neighbours' work
            rivals = [v for v in row["variants"] if v["variant"] == "engine" or v.get("config")]
            best = min(rivals, key=lambda v: v["us"]["median"])
            found[row["n"], row["k"], row["tokens"]] = Config(*best["config"]) if best.get("config") else None
        return Choices(found)

    def find(self, n: int, k: int, tokens: int) -> Config | None:
        batches = [batch for rows, columns, batch in self.measured if (rows, columns) == (n, k)]
        if not batches:
            return self.default
        return self.measured[n, k, min(batches, key=lambda batch: abs(batch - tokens))]


def install(model: CausalLM, choices: Choices | None = None) -> int:
    """Gives `model`'s layers their fused forward; before its steps are captured. Returns how many layers got it.

    Left as they are: layers with biases, experts or packed weights, and all of a model that is split over ranks.
    """
    registry()  # loads the laboratory's kernels, this one among them
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    fit = [layer for layer in layers if _fits(layer)]
    for layer in fit:
        setattr(layer, "forward", partial(_forward, layer, choices or Choices(), layer is layers[-1]))  # noqa: B010
    return len(fit)


def _fits(layer: DecoderLayer) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    if not (isinstance(attention, Attention) and isinstance(mlp, MLP)):
        return False
    projections = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
    whole = attention.o_proj.tp.size == 1
    return whole and all(p.bias is None and isinstance(p.weight, Tensor) for p in projections)


def _forward(
    layer: DecoderLayer,
    choices: Choices,
    last: bool,
    x: Tensor,
    residual: Tensor | None,
    rotation: Rotation | Tensor,
    batch: ForwardBatch,
) -> tuple[Tensor, Tensor | None]:
    """As `DecoderLayer.forward`; between two such layers the residual stream is `x`, with nothing to add to it."""
    if x.shape[0] > ladder.MAX_ROWS:
        return DecoderLayer.forward(layer, x, residual, rotation, batch)
    stream = x if residual is None else residual.add_(x)
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    call = partial(_product, choices)
    qkv = call(stream, attention.qkv_proj.weight, norm=layer.input_layernorm)
    heads = qkv.view(x.shape[0], -1, attention.head_dim)
    rotate = attention._rotate_and_store if isinstance(rotation, Rotation) else attention._rotate_and_store_fused
    q = rotate(heads, rotation, batch)  # type: ignore[arg-type]
    out = batch.attention.forward(q, attention.layer, batch, attention.scale, attention.window)
    call(out.view(x.shape[0], -1), attention.o_proj.weight, add_to=stream)
    inner = call(stream, mlp.gate_up_proj.weight, norm=layer.post_attention_layernorm, gated=True)
    if last:  # the model's own norm adds
        return call(inner, mlp.down_proj.weight), stream
    call(inner, mlp.down_proj.weight, add_to=stream)
    return stream, None


def _product(
    choices: Choices,
    x: Tensor,
    weight: Weight,
    norm: RMSNorm | None = None,
    gated: bool = False,
    add_to: Tensor | None = None,
) -> Tensor:
    """norm(x) · weightᵀ, [T, N] or if gated [T, N / 2]; or added to `add_to`, which comes back."""
    assert isinstance(weight, Tensor)
    n, k = weight.shape
    config = choices.find(n, k, x.shape[0])
    if config is None:
        y = F.linear(x if norm is None else norm(x)[0], weight)
        if gated and y.is_cuda:
            silu_mul(y, out := y.new_empty(y.shape[0], n // 2))
            return out
        if gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate).mul_(up)
        return y if add_to is None else add_to.add_(y)
    out = x.new_empty(x.shape[0], n // 2 if gated else n) if add_to is None else add_to
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    ladder.skinny_gemm(x, weight, out, gain, eps, gated, add_to is not None, config=config)
    return out


__all__ = ["Choices", "install"]
