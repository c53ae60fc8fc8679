"""A greedy loop over model, pool and attention alone: what the model tests drive instead of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from minisgl.attention import make_attention
from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.cache.pool import KVPool
from minisgl.models.decoder import CausalLM


@dataclass
class Sequence:
    tokens: list[int]
    pages: list[int]
    done: int = 0  # positions whose keys and values are in the pool
    out: list[int] = field(default_factory=list)


class Loop:
    """Sequences over one pool, whose pages are handed out in scrambled order."""

    def __init__(self, model: CausalLM, page_size: int = 4, num_pages: int = 512, scramble: bool = True) -> None:
        c, parameter = model.config, next(model.parameters())
        self.model, self.page_size = model, page_size
        self.pool = KVPool(
            c.num_layers,
            model.num_kv_heads_per_rank,
            c.head_dim,
            page_size,
            num_pages,
            parameter.dtype,
            parameter.device,
        )
        self.attention: AttentionBackend = make_attention("torch_sdpa")
        order = np.random.default_rng(0).permutation(num_pages) if scramble else np.arange(num_pages)[::-1]
        self.free: list[int] = order.tolist()

    def add(self, prompt: list[int]) -> Sequence:
        return Sequence(list(prompt), [])

    def _batch(self, work: list[tuple[Sequence, int]], want_all: bool) -> ForwardBatch:
        for seq, count in work:
            while len(seq.pages) * self.page_size < seq.done + count:
                seq.pages.append(self.free.pop())
        device = self.pool.k.device
        ids = [t for seq, n in work for t in seq.tokens[seq.done : seq.done + n]]
        positions = [p for seq, n in work for p in range(seq.done, seq.done + n)]
        slots = [
            seq.pages[p // self.page_size] * self.page_size + p % self.page_size
            for seq, n in work
            for p in range(seq.done, seq.done + n)
        ]
        width = max(len(seq.pages) for seq, _ in work)
        table = [seq.pages + [0] * (width - len(seq.pages)) for seq, _ in work]
        lens = np.array([seq.done + n for seq, n in work], np.int32)
        counts = np.array([n for _, n in work], np.int32)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        rows = range(len(ids)) if want_all else starts[1:] - 1
        batch = ForwardBatch(
            input_ids=torch.tensor(ids, dtype=torch.int32, device=device),
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            page_table=torch.tensor(table, dtype=torch.int32, device=device),
            seq_lens=torch.from_numpy(lens).to(device),
            query_starts=torch.from_numpy(starts).to(device),
            logits_indices=torch.tensor(list(rows), dtype=torch.int64, device=device),
            num_decodes=sum(n == 1 and seq.done > 0 for seq, n in work),
            seq_lens_host=lens,
            query_lens_host=counts,
            pool=self.pool,
            attention=self.attention,
        )
        self.attention.prepare(batch)
        return batch

    @torch.inference_mode()
    def step(self, work: list[tuple[Sequence, int]], want_all: bool = False) -> torch.Tensor:
        """Computes the next n tokens of each sequence, decodes first; the logits of their last, or of all, rows."""
        logits = self.model.forward(self._batch(work, want_all))
        for seq, n in work:
            seq.done += n
        return logits

    def logits(self, prompt: list[int], chunk: int | None = None) -> torch.Tensor:
        """Logits at every position of one prompt, computed in chunks: [len(prompt), vocab_size]."""
        seq, rows = self.add(prompt), []
        while seq.done < len(prompt):
            rows.append(self.step([(seq, min(chunk or len(prompt), len(prompt) - seq.done))], want_all=True))
        return torch.cat(rows)

    def greedy(self, prompts: list[list[int]], num_tokens: int, chunk: int | None = None) -> list[list[int]]:
        """`num_tokens` greedy tokens of each prompt. They start a step apart, so that steps mix decodes and prefill."""
        waiting = [self.add(prompt) for prompt in prompts]
        every, running = list(waiting), []
        while waiting or running:
            if waiting:
                running.append(waiting.pop(0))
            work = [(s, min(chunk or len(s.tokens), len(s.tokens) - s.done)) for s in running]
            work.sort(key=lambda w: not (w[1] == 1 and w[0].done > 0))  # decodes first
            best = self.step(work).argmax(-1).tolist()
            for (seq, _), token in zip(work, best, strict=True):
                if seq.done == len(seq.tokens):
                    seq.tokens.append(token)
                    seq.out.append(token)
            running = [s for s in running if len(s.out) < num_tokens]
        return [s.out for s in every]
