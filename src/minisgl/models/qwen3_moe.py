"""Qwen3-MoE: Qwen3 whose MLP is a mixture of experts in most layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisgl.models.build import Build, Place
from minisgl.models.config import MoEConfig, Values
from minisgl.models.layers import MLP, summand
from minisgl.models.qwen3 import Qwen3


class Experts(nn.Module):
    """The MLPs of all experts, stacked. Ranks hold a share of every expert's inner width."""

    def __init__(self, build: Build, moe: MoEConfig) -> None:
        super().__init__()
        self.moe, hidden = moe, build.config.hidden_size
        self.share = build.tp.shard(moe.intermediate_size, "columns of an expert")
        self.start = build.tp.rank * self.share
        self.gate_up = build.empty(moe.num_experts, 2 * self.share, hidden)
        self.down = build.empty(moe.num_experts, hidden, self.share)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """This rank's part of expert number `expert` on `x` [n, hidden_size]."""
        gate, up = F.linear(x, self.gate_up[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), self.down[expert])

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        inner, hidden, share = self.moe.intermediate_size, self.down.shape[1], self.share
        for i in range(self.moe.num_experts):
            gate, up = self.gate_up[i, :share], self.gate_up[i, share:]
            yield f"{path}.{i}.gate_proj.weight", Place(gate, (inner, hidden), 0, self.start, share)
            yield f"{path}.{i}.up_proj.weight", Place(up, (inner, hidden), 0, self.start, share)
            yield f"{path}.{i}.down_proj.weight", Place(self.down[i], (hidden, inner), 1, self.start, share)


class Router(nn.Module):
    """Which experts a token goes to, and with what weights."""

    def __init__(self, build: Build, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.weight = build.empty(moe.num_experts, build.config.hidden_size)

    def logits(self, x: Tensor) -> Tensor:
        """[T, hidden_size] → [T, num_experts]."""
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [T, hidden_size] → weights [T, k] float32 and expert numbers [T, k], k experts a token."""
        probabilities = self.logits(x).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.moe.num_experts_per_token, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True) if self.moe.normalise else weights, chosen

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        yield f"{path}.weight", Place(self.weight, tuple(self.weight.shape))


class MixtureOfExperts(nn.Module):
    """Sum of the chosen experts' outputs, weighted.

    On a GPU by Triton kernels, of which the host needs nothing. Else one pass a chosen expert: correct anywhere, fast
    nowhere.
    """

    def __init__(self, build: Build, moe: MoEConfig) -> None:
        super().__init__()
        self.tp = build.tp
        self.gate = Router(build, moe)
        self.experts = Experts(build, moe)
        self.fused = build.triton

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """`x` [T, hidden_size] → [T, hidden_size]; a single rank can have it added to `add_to`, which comes back."""
        if self.fused:
            return self._forward_fused(x, add_to)
        weights, chosen = self.gate(x)
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            out.index_add_(0, token, self.experts(x[token], expert) * weights[token, place, None])
        out = self.tp.all_reduce(out).to(x.dtype)
        return out if add_to is None else add_to.add_(out)

    def _forward_fused(self, x: Tensor, add_to: Tensor | None) -> Tensor:
        from minisgl.kernels.moe.op import moe

        config, experts = self.gate.moe, self.experts
        out = summand(self.tp, x, x.shape[1]) if add_to is None else add_to
        choice = config.num_experts_per_token, config.normalise, add_to is not None
        moe(x, self.gate.logits(x), experts.gate_up, experts.down, out, *choice)
        return self.tp.all_reduce(out)


class Qwen3MoE(Qwen3):
    family = "qwen3_moe"
    gguf_architecture = "qwen3moe"

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self.capturable = build.triton  # else the host asks which experts were chosen

    @staticmethod
    def read_fields(values: Values, num_layers: int) -> dict[str, Any]:
        experts = values.integer("num_experts", values.integer("num_local_experts", 128))
        step = values.integer("decoder_sparse_step", 1)
        dense = values.items("mlp_only_layers", [])
        if not all(isinstance(i, int) for i in dense):
            raise values.error("mlp_only_layers", f"is {dense!r}; expected numbers of layers")
        moe = MoEConfig(
            num_experts=experts,
            num_experts_per_token=values.integer("num_experts_per_tok", 8),
            intermediate_size=values.integer("moe_intermediate_size", 768),
            normalise=values.flag("norm_topk_prob", False),
            dense_layers=tuple(i for i in range(num_layers) if i in dense or (i + 1) % step),
        )
        fields = Qwen3.read_fields(values, num_layers)
        window = values.integer("sliding_window", 4096) if values.flag("use_sliding_window", False) else None
        return fields | {"moe": moe, "windows": (window,) * num_layers}

    @staticmethod
    def read_gguf_fields(values: Values) -> dict[str, Any]:
        moe = MoEConfig(
            num_experts=values.integer("expert_count"),
            num_experts_per_token=values.integer("expert_used_count"),
            intermediate_size=values.integer("expert_feed_forward_length"),
            normalise=True,  # the format has no key for it: every Qwen3-MoE does
        )
        return {"moe": moe}

    def make_mlp(self, build: Build, layer: int) -> nn.Module:
        moe = build.config.moe
        assert moe is not None
        return MLP(build) if layer in moe.dense_layers else MixtureOfExperts(build, moe)
