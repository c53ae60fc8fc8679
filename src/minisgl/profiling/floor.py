"""What the hardware allows: the least time in which a workload of generation can be done.

Every step reads all weights that it uses, and the keys and values of every token before the one computed: memory.
Every token is multiplied with the weights, and its queries with those keys and values: arithmetic. Neither can be
done faster than the device has been measured to read and to multiply, so the larger of the two times is a floor.
docs/bench.md has the formulas.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from minisgl.engine.engine import Engine
    from minisgl.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device was measured to do, per second."""

    bytes: float  # read from memory
    flops: float  # in a large matrix product


@dataclass(frozen=True, slots=True)
class Cost:
    """What a workload takes, whoever serves it."""

    bytes: float
    flops: float

    def seconds(self, speed: Speed) -> float:
        """The floor: the slower of memory and arithmetic."""
        return max(self.bytes / speed.bytes, self.flops / speed.flops)


# -- the device ----------------------------------------------------------------------------------------------------


def measure(device: str, dtype: str) -> Speed:
    """Bandwidth and arithmetic of `device`, as torch reaches them; the best of several runs. Leaves no memory taken.

    On a CPU arithmetic is that of the fastest floating-point type, as the engine may compute in another than `dtype`.
    """
    if device == "cuda":
        source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.numel() / _best(lambda: target.copy_(source), device)
        flops = _matmul_flops(8192, getattr(torch, dtype), device)
        del source, target
        torch.cuda.empty_cache()
        return Speed(bandwidth, flops)
    numbers = torch.ones(1 << 26)  # 256 MiB, more than caches hold
    bandwidth = numbers.numel() * 4 / _best(numbers.sum, device)
    return Speed(bandwidth, max(_matmul_flops(1024, t, device) for t in (torch.float32, torch.bfloat16)))


def _matmul_flops(size: int, dtype: torch.dtype, device: str) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return 2 * size**3 / _best(lambda: torch.mm(a, a, out=out), device)


def _best(call: Callable[[], object], device: str, repeat: int = 5) -> float:
    """Seconds of the fastest call, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


# -- the work ------------------------------------------------------------------------------------------------------


def workload_cost(engine: Engine, prompts: Sequence[int], outputs: Sequence[int]) -> Cost:
    """Bytes and floating-point operations of requests with these numbers of prompt and output tokens.

    Of several ranks, those of one GPU; ranks on a CPU share its memory and its arithmetic.
    """
    model, running = engine.model.config, engine.config.max_running or len(prompts)
    num_outputs = sum(outputs)
    steps = max(max(outputs), -(-num_outputs // running))
    weights = steps * step_bytes(engine, num_outputs / steps)
    computed = sum(prompts) + num_outputs - len(prompts)  # the last token of a request isn't fed back
    requests = list(zip(prompts, outputs, strict=True))
    reads = _seen(model, [(p + 1, p + o) for p, o in requests])  # by decode steps; those of prefill are left out
    pairs = _seen(model, [(1, p + o) for p, o in requests])
    head = model.vocab_size * model.hidden_size
    flops = 2.0 * (body_parameters(model) * computed + head * num_outputs)
    flops += 4.0 * model.num_heads * model.head_dim * pairs
    num_bytes = weights + reads * kv_bytes(engine) / model.num_layers
    ranks = engine.tp.size
    return Cost(num_bytes, flops / ranks) if engine.device.type == "cuda" else Cost(num_bytes * ranks, flops)


def _seen(model: ModelConfig, contexts: Sequence[tuple[int, int]]) -> int:
    """Tokens that queries see, over all layers: a query for each context length of each half-open range."""
    layers = Counter(model.windows or (None,) * model.num_layers)
    return sum(n * _sum_capped(start, end, window) for window, n in layers.items() for start, end in contexts)


def _sum_capped(start: int, end: int, cap: int | None) -> int:
    """min(start, cap) + … + min(end − 1, cap)."""
    full = end if cap is None else min(max(cap, start), end)  # from here on the cap counts
    below = (full * (full - 1) - start * (start - 1)) // 2
    return below + (end - full) * (cap or 0)


def body_parameters(model: ModelConfig) -> int:
    """Matrix parameters of the layers that one token is multiplied with; of experts, those it is sent to."""
    hidden, head = model.hidden_size, model.head_dim
    attention = hidden * head * (model.num_heads + 2 * model.num_kv_heads) + model.num_heads * head * hidden
    dense = 3 * hidden * model.intermediate_size
    if model.moe is None:
        return model.num_layers * (attention + dense)
    sparse = hidden * model.moe.num_experts + model.moe.num_experts_per_token * 3 * hidden * model.moe.intermediate_size
    num_dense = len(model.moe.dense_layers)
    return model.num_layers * attention + num_dense * dense + (model.num_layers - num_dense) * sparse


def weight_bytes(engine: Engine) -> int:
    """Bytes of all weights but an embedding table that isn't the LM head as well."""
    model = engine.model
    weights = (w for m in model.modules() for w in (*m.parameters(recurse=False), getattr(m, "weight", None)))
    total = sum({id(w): w.nbytes for w in weights if w is not None}.values())  # packed ones are no parameters
    return int(total if model.config.tie_embeddings else total - model.embed_tokens.weight.nbytes)


def kv_bytes(engine: Engine) -> int:
    """Bytes of keys and values of one token, over all layers."""
    pool = engine.runner.pool
    return 2 * pool.num_layers * pool.num_kv_heads * pool.head_dim * pool.k.element_size()


def step_bytes(engine: Engine, batch: float) -> float:
    """Bytes of weights that a step over `batch` tokens reads; of experts, those that random routing touches."""
    total, moe = weight_bytes(engine), engine.model.config.moe
    if moe is None:
        return total
    config = engine.model.config
    itemsize: int = getattr(torch, engine.config.dtype).itemsize
    num_sparse = config.num_layers - len(moe.dense_layers)
    experts = num_sparse * moe.num_experts * 3 * config.hidden_size * moe.intermediate_size * itemsize
    touched: float = 1 - (1 - moe.num_experts_per_token / moe.num_experts) ** batch
    return total - experts / engine.tp.size * (1 - touched)
