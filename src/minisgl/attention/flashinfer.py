"""FlashInfer's kernels, of the optional package flashinfer-python, behind the interface of the project's own.

Its wrappers want a plan before they run: the host, which knows the lengths, shares out the work. One wrapper serves all
steps outside of graphs, its decodes as extending sequences like any other. A captured decode step has a wrapper of its
own over fixed memory: its graph lists the pages, and the host plans it again before each replay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper as Decode
from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Prefill
from flashinfer import fast_decode_plan
from torch import Tensor

from minisgl.attention.base import AttentionBackend, ForwardBatch
from minisgl.attention.triton_pages import PageList, list_pages, page_counts
from minisgl.cache.pool import KVPool
from minisgl.types import ConfigError

WORKSPACE = 384 << 20  # bytes for partial results, which every wrapper leaves to the next
PLAN = 1 << 20  # bytes for the plan of a captured step: a few words for each tile, of which there are some hundreds
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
FEW = 3  # query heads a KV head, up to which decodes run without matrix units
Asked = tuple[float, int | None]  # scale and window, which layers of one model may have of their own


@dataclass(frozen=True, slots=True)
class Planner:
    """A wrapper, and what its plans have in common."""

    wrapper: Any
    pages: Any  # of a captured step, a PageList; else None
    options: dict[str, Any]
    # After the copy of the plan to the device: the next one is written to the same memory.
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def plan(self, plan: Callable[..., None], *args: Any, **more: Any) -> None:
        self.copied.synchronize()
        plan(*args, **self.options, **more)
        self.copied.record()


class FlashInfer(AttentionBackend):
    """Attention on NVIDIA GPUs in 16-bit types. The first step of a shape compiles its kernels, which takes minutes.

    Raises:
        ConfigError: there is no GPU that it serves.
    """

    name = "flashinfer"
    capturable = True

    def __init__(self) -> None:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
            raise ConfigError("attention flashinfer needs an NVIDIA GPU from compute capability 8.0 on; use torch_sdpa")
        self._workspace = self._ids = torch.empty(0)
        self._eager: dict[Asked, Planner] = {}
        self._captured: defaultdict[tuple[int, int], dict[Asked, Planner]] = defaultdict(dict)

    def check(self, pool: KVPool) -> None:
        for name, value, served in (("head_dim", pool.head_dim, HEAD_DIMS), ("dtype", pool.k.dtype, DTYPES)):
            if value not in served:
                raise ConfigError(f"attention flashinfer serves {name} {served}, not {value}; use --attention triton")

    def prepare(self, batch: ForwardBatch) -> None:
        batch.plan = {}
        if not self._workspace.numel():
            self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=batch.seq_lens.device)

    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        asked = scale, window
        if asked not in batch.plan:
            planned = self._eager_step if batch.table_rows is None else self._captured_step
            batch.plan[asked] = planned(q, batch, asked)
        return batch.plan[asked].run(q, (batch.pool.k[layer], batch.pool.v[layer]))  # type: ignore[no-any-return]

    def before_replay(self, size: int, pages: int, starts: Sequence[int]) -> None:
        lens = np.ones(size, np.int32)
        lens[: len(starts)] += np.array(starts, np.int32)
        for planner in self._captured[size, pages].values():
            starts_host, last = page_counts(lens, planner.options["page_size"])
            lists = starts_host, planner.pages.ids, last
            planner.plan(fast_decode_plan, planner.wrapper, *lists, global_override_indptr_cpu=starts_host)

    def _eager_step(self, q: Tensor, batch: ForwardBatch, asked: Asked) -> Any:
        """The wrapper of steps outside of graphs, planned."""
        if asked not in self._eager:
            options = _options(q, batch.pool, asked) | {"head_dim_qk": q.shape[2], "causal": True}
            self._eager[asked] = Planner(Prefill(self._workspace, "NHD"), None, options)
        planner, size, lens = self._eager[asked], batch.pool.page_size, batch.seq_lens_host
        starts, last_counts = page_counts(lens, size)
        ids = torch.empty(int(starts[-1]), dtype=torch.int32, device=q.device)
        list_pages(batch.page_table, None, batch.seq_lens, size, PageList.empty(len(lens), ids))
        queries = torch.from_numpy(np.cumsum([0, *batch.query_lens_host], dtype=np.int32))
        planner.plan(planner.wrapper.plan, queries, starts, ids, last_counts)
        return planner.wrapper

    def _captured_step(self, q: Tensor, batch: ForwardBatch, asked: Asked) -> Any:
        """The wrapper of this size, made before a graph is captured; its pages are listed on the device."""
        steps = self._captured[batch.num_decodes, batch.page_table.shape[1]]
        if asked not in steps:
            steps[asked] = self._make(q, batch, asked)
        list_pages(batch.page_table, batch.table_rows, batch.seq_lens, batch.pool.page_size, steps[asked].pages)
        return steps[asked].wrapper

    def _make(self, q: Tensor, batch: ForwardBatch, asked: Asked) -> Planner:
        """For a captured step, planned for sequences of one token."""
        size, most, pool = batch.num_decodes, batch.num_decodes * batch.page_table.shape[1], batch.pool
        if self._ids.numel() < most:  # one list for all steps, since each writes it anew
            self._ids = torch.empty(most, dtype=torch.int32, device=q.device)
        pages = PageList.empty(size, self._ids)
        wrapper = Decode(self._workspace, "NHD", True, q.shape[1] // pool.num_kv_heads > FEW, *pages, "fa2")
        # Not the 8 MiB that each comes with.
        wrapper.reset_workspace_buffer(self._workspace, torch.empty(PLAN, dtype=torch.uint8, device=q.device))
        planner = Planner(wrapper, pages, _options(q, pool, asked) | {"head_dim": q.shape[2]})
        starts, last_counts = page_counts(np.ones(size, np.int32), pool.page_size)
        planner.plan(wrapper.plan, starts, self._ids[:size], last_counts)
        return planner


def _options(q: Tensor, pool: KVPool, asked: Asked) -> dict[str, Any]:
    scale, window = asked
    return {
        "num_qo_heads": q.shape[1], "num_kv_heads": pool.num_kv_heads, "page_size": pool.page_size, "sm_scale": scale,
        "window_left": -1 if window is None else window - 1,  # positions before the query's own
        "q_data_type": q.dtype, "kv_data_type": q.dtype,
    }  # fmt: skip
