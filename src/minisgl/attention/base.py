"""What attention is asked: the batch of one forward pass, and the interface of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from minisgl.cache.pool import KVPool


@dataclass(slots=True)
class ForwardBatch:
    """Everything one forward pass needs: T tokens of S sequences, one sequence after another, decodes first.

    A sequence contributes `query_lens[i]` tokens at the end of its `seq_lens[i]`; what came before them is in the
    pool, at the pages that `page_table[i]` lists. Host copies (`*_host`, NumPy int32) are for backends that loop.
    """

    input_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int64: where this step's keys and values go
    page_table: Tensor  # [S, P] int32, rows padded with any valid page; [any, P] with `table_rows`
    seq_lens: Tensor  # [S] int32: tokens up to and including this step's
    query_starts: Tensor  # [S + 1] int32: prefix sums of the query lengths
    logits_indices: Tensor | None  # [R] int64: rows of [T] whose logits are wanted; None: of all
    num_decodes: int  # leading sequences with one query token and everything else in the pool
    seq_lens_host: np.ndarray  # [S]
    query_lens_host: np.ndarray  # [S]
    pool: KVPool
    attention: AttentionBackend
    plan: Any = None  # what the backend prepared for this batch
    table_rows: Tensor | None = (
        None  # [S] int32: each sequence's row of the table, if not its own number (captured steps)
    )


class AttentionBackend(ABC):
    """Attention over the paged pool. One instance serves every layer."""

    name: str
    capturable = False  # decodes read lengths and pages on the device alone, so that CUDA graphs can hold them
    captures_prompts = False  # so does everything else, for steps of whatever mix
    short_context: int | None = None  # tokens: decodes cost less if a page table has no room for more

    def check(self, pool: KVPool) -> None:  # noqa: B027 (optional)
        """Called at start, with a pool like the one to come.

        Raises:
            ConfigError: the backend can't read it.
        """

    def prepare(self, batch: ForwardBatch) -> None:  # noqa: B027 (optional)
        """Called once a step, before the first layer: what all layers share goes into `batch.plan`."""

    def before_replay(self, size: int, pages: int, starts: Sequence[int]) -> None:  # noqa: B027 (optional)
        """Called before the graph of a decode step is replayed, for backends whose host has to know the lengths.

        Args:
            size: sequences of the captured step; those beyond `starts` are padding, of one token.
            pages: the width of its page table.
            starts: tokens that each sequence has before this step's.
        """

    @abstractmethod
    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        """Causal attention of this step's queries over the pool, which holds this step's keys and values already.

        Args:
            q: [T, num_heads, head_dim]; num_heads is a multiple of the pool's num_kv_heads.
            scale: factor on the scores.
            window: a query at position p sees positions above p - window; None: all up to p.

        Returns:
            [T, num_heads, head_dim], q's dtype, contiguous.
        """
