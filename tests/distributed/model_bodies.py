"""What the ranks of `test_models.py` do. With a group of one, the same gives what they are compared with."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import Loop
from torch import Tensor

from minisgl.attention import make_attention
from minisgl.config import EngineConfig
from minisgl.distributed import TPGroup
from minisgl.engine.engine import Engine
from minisgl.engine.sampler import RowState, sample
from minisgl.engine.state import DeviceRows, RowParams, param_words
from minisgl.kernels import cpu
from minisgl.messages import TokenOutput
from minisgl.models.registry import load_model
from minisgl.models.sharding import VocabRange
from minisgl.types import Request, SamplingParams, TokenLogprob

CPU = torch.device("cpu")
Answer = tuple[list[int], list[TokenLogprob], list[TokenLogprob]]  # tokens, their logprobs, the prompt's


@torch.inference_mode()
def logits(
    group: TPGroup, paths: Sequence[Path], ids: list[int], attention: str = "torch_sdpa", on_gpu: bool = False
) -> list[np.ndarray]:
    """Logits [T, vocab_size] of a prompt in chunks, for each model in float32.

    Args:
        attention: `cpu` also packs the weights.
        on_gpu: each rank on its own, with the project's kernels between the matrix products.
    """
    found = []
    device, packed = torch.device("cuda", group.rank) if on_gpu else CPU, attention == "cpu"
    for path in paths:
        os.environ.setdefault("MINISGL_CACHE", str(path.parent / "cache"))
        model = load_model(path, torch.float32, device, group, progress=False, packed=packed, fused=on_gpu)
        loop = Loop(model)
        loop.attention = make_attention(attention)
        found.append(group.all_gather(loop.logits(ids, chunk=17))[:, : model.vocab.vocab_size].cpu().numpy())
    return found


def answers(
    group: TPGroup, paths: Sequence[Path], requests: list[tuple[list[int], SamplingParams]], options: dict[str, Any]
) -> list[tuple[list[Answer], int, int]]:
    """Of an engine for each model, which serves all requests at once; times it preempted, and prompt tokens cached."""
    return [
        _serve(Engine(EngineConfig(str(path), **{"device": "cpu", "tp_size": group.size} | options), group), requests)
        for path in paths
    ]


def _serve(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> tuple[list[Answer], int, int]:
    found: dict[str, Answer] = {str(i): ([], [], []) for i in range(len(requests))}
    for id, (prompt, params) in zip(found, requests, strict=True):
        engine.add(id, array("i", prompt), params.resolve({}, ()))
    while engine.has_work:
        for output in engine.step():
            _take(found[output.id], output)
        engine.scheduler.check_integrity()
    stats = engine.stats()
    return list(found.values()), stats.preemptions, stats.cached_tokens


def _take(answer: Answer, output: TokenOutput) -> None:
    assert output.error is None
    answer[0].extend(output.tokens)
    answer[1].extend(output.logprobs)
    answer[2].extend(output.prompt_logprobs)


def draws(group: TPGroup, logits: np.ndarray, requests: list[SamplingParams], native: bool) -> list[Any]:
    """Three tokens a row for `logits` [R, V], of which each rank sees its own ids alone; logprobs beside them.

    Args:
        native: by the C++ kernel, where there is one.
    """
    available, cpu.available = cpu.available, cpu.available if native else lambda: False  # type: ignore[assignment]
    try:
        return _draws(group, torch.from_numpy(logits), requests)
    finally:
        cpu.available = available  # type: ignore[assignment]


def _draws(group: TPGroup, logits: Tensor, requests: list[SamplingParams]) -> list[Any]:
    vocab = VocabRange(logits.shape[1], group)
    own = torch.full((logits.shape[0], vocab.rows), float("-inf"))
    own[:, : vocab.size] = logits[:, vocab.start : vocab.start + vocab.size]
    made = [Request(str(i), array("i", [3, 50, 50, 100]), p.resolve({}, ())) for i, p in enumerate(requests)]
    states = [RowState(request, vocab) for request in made]
    kept = DeviceRows(len(made), 1, 0, CPU)
    rows = torch.arange(len(made))
    kept.write_params(rows, torch.stack([torch.from_numpy(param_words(r, 40 + i)) for i, r in enumerate(made)]))
    for place, request in enumerate(made):
        request.row = place
        kept.keep_tokens(request, len(request.tokens) + 3)
    params = RowParams(kept.params[:-1])
    found: list[Any] = []
    for index in range(3):
        before = own.clone()
        places, past = torch.full((len(made),), index), kept.past(rows, 4 + index)
        out = sample(own, states, params, places, [index] * len(made), vocab, past)
        assert torch.equal(own, before)
        kept.append(rows, 4 + places, out.tokens)
        more = (out.logprobs, out.top_ids, out.top_logprobs)
        found.append((out.tokens.tolist(), *(None if x is None else x.tolist() for x in more)))
    return found


def all_draws(group: TPGroup, cases: list[tuple[np.ndarray, list[SamplingParams]]], native: bool) -> list[list[Any]]:
    return [draws(group, *case, native) for case in cases]
