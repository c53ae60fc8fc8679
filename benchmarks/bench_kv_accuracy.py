"""What an FP8 KV cache costs in accuracy: teacher-forced logits and perplexity, beside a float32 and a bfloat16 cache.

    python benchmarks/bench_kv_accuracy.py [--model smollm2] [--tokens 4096] [--chunk 1024] [--no-save]

Weights and activations are float32, so that nothing but the cache differs. The text is this repository's LICENSE and
docs/tour.md, cut into chunks; each is computed in one step whose attention reads what the cache holds. Printed are the
perplexity, the Kullback-Leibler divergence from the float32 cache's distribution (nats a token), and how often the
most likely token is the same. `fp8, scales of 1` shows what the scales by KV head are worth.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, append_line, environment
from torch import Tensor

from minisgl.attention import ForwardBatch, make_attention
from minisgl.cache.pool import FP8, KVPool
from minisgl.models.decoder import CausalLM
from minisgl.models.hub import resolve_model
from minisgl.models.kv_scales import kv_scales
from minisgl.models.registry import load_model
from minisgl.text import load_text

PAGE = 16
TEXTS = ("LICENSE", "docs/tour.md")


class RoundedPool(KVPool):
    """A float32 pool of what bfloat16 can hold."""

    def store(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        super().store(layer, k.bfloat16().float(), v.bfloat16().float(), slots)


def make_pool(kind: str, model: CausalLM, tokens: int) -> KVPool:
    shape = (model.config.num_layers, model.num_kv_heads_per_rank, model.config.head_dim, PAGE, -(-tokens // PAGE))
    device = model.norm.weight.device
    if kind in ("float32", "bfloat16"):
        return (RoundedPool if kind == "bfloat16" else KVPool)(*shape, torch.float32, device)
    pool = KVPool(*shape, FP8, device)
    if kind == "fp8":
        pool.set_scales(*kv_scales(model))
    return pool


def one_sequence(ids: list[int], pool: KVPool) -> ForwardBatch:
    """All of `ids` in one step, logits wanted everywhere."""
    count, device = len(ids), pool.k.device
    positions = torch.arange(count, dtype=torch.int32, device=device)
    lens = np.array([count], np.int32)
    batch = ForwardBatch(
        torch.tensor(ids, dtype=torch.int32, device=device), positions, positions.long(),
        torch.arange(pool.num_pages, dtype=torch.int32, device=device)[None], torch.from_numpy(lens).to(device),
        torch.tensor([0, count], dtype=torch.int32, device=device), positions.long(), 0, lens, lens,
        pool, make_attention("torch_sdpa"),
    )  # fmt: skip
    batch.attention.prepare(batch)
    return batch


def distributions(model: CausalLM, kind: str, chunks: list[list[int]]) -> list[Tensor]:
    """Log-probabilities [tokens, vocab_size] of each chunk."""
    return [model(one_sequence(ids, make_pool(kind, model, len(ids)))).float().log_softmax(-1) for ids in chunks]


def compare(exact: list[Tensor], ours: list[Tensor], chunks: list[list[int]]) -> dict[str, float]:
    divergence = torch.cat([(e.exp() * (e - o)).sum(-1) for e, o in zip(exact, ours, strict=True)])
    same = torch.cat([e.argmax(-1) == o.argmax(-1) for e, o in zip(exact, ours, strict=True)])
    loss = torch.cat(
        [-o[:-1].gather(1, torch.tensor(c[1:], device=o.device)[:, None]) for o, c in zip(ours, chunks, strict=True)]
    )
    return {
        "perplexity": loss.mean().exp().item(),
        "divergence": divergence.mean().item(),
        "divergence_p99": divergence.quantile(0.99).item(),
        "same_top": same.float().mean().item(),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens computed in one step (default: 1024)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    path = Path(resolve_model(args.model))
    model = load_model(path, torch.float32, torch.device(args.device), progress=False)
    text = "".join((HERE.parent / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = list(load_text(path).tokenizer.encode(text))[: args.tokens]
    chunks = [ids[i : i + args.chunk] for i in range(0, len(ids), args.chunk)]
    digest = hashlib.sha256(np.array(ids, np.int32).tobytes()).hexdigest()[:16]
    print(f"{args.model}: {len(ids)} tokens ({digest}) of {', '.join(TEXTS)} in chunks of {args.chunk}")
    exact, rows = distributions(model, "float32", chunks), []
    for kind in ("float32", "bfloat16", "fp8", "fp8, scales of 1"):
        row: dict[str, Any] = compare(exact, distributions(model, kind, chunks), chunks)
        print(
            f"{kind:18} perplexity {row['perplexity']:8.4f}   divergence {row['divergence']:.2e} "
            f"(p99 {row['divergence_p99']:.2e})   same top token {row['same_top']:7.2%}"
        )
        rows.append({"cache": kind} | row)
    if not args.no_save:
        settings = {"model": args.model, "tokens": len(ids), "chunk": args.chunk, "texts": TEXTS, "ids_sha256": digest}
        append_line(
            "kv_accuracy.jsonl", environment(args.device) | {"benchmark": "kv_accuracy"} | settings | {"rows": rows}
        )


if __name__ == "__main__":
    main()
