"""The engine: model, scheduler and runner behind one step loop. It knows token ids and nothing of text."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from minisgl.attention import AttentionBackend, make_attention
from minisgl.cache.pool import FP8, KVPool
from minisgl.cache.prefix import make_prefix_cache
from minisgl.config import EngineConfig, resolve
from minisgl.distributed import TPGroup
from minisgl.engine.budget import explained, measure
from minisgl.engine.graphs import batch_sizes
from minisgl.engine.memory import choose_num_pages
from minisgl.engine.prompt_graphs import prompt_sizes
from minisgl.engine.runner import ModelRunner, StepHandle, StepResult
from minisgl.engine.scheduler import Scheduler
from minisgl.hardware import detect
from minisgl.messages import EngineStats, TokenOutput
from minisgl.models.hub import resolve_model
from minisgl.models.kv_scales import kv_scales
from minisgl.models.registry import load_model
from minisgl.models.spans import add_spans
from minisgl.timing import phase, span, use_nvtx
from minisgl.types import ConfigError, FinishReason, ModelError, Request, SamplingParams, TokenLogprob, check_ids

log = logging.getLogger(__name__)
_NONE: list[TokenLogprob] = []  # shared by outputs without: to make an empty list each costs a third of their time


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of `config`, resolved: for rank n of several the n-th GPU, which becomes the current one."""
    if config.device == "cuda" and config.tp_size > 1:
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    return torch.device(config.device)


class Engine:
    """Serves requests of token ids, a step at a time.

    With overlap, a step is scheduled and launched before the one before it is collected (a lag of 1). As a rank of
    several it holds a share of the model. What is computed when follows from the calls and from the tokens alone, so
    ranks that get the same calls stay alike.

    Args:
        tp: the ranks' group, of which this is one; None: alone.
        agree: from the KV pages that this rank has room for to those that every rank takes.

    Raises:
        ConfigError, ModelError: it can't be built as configured.
    """

    def __init__(
        self, config: EngineConfig, tp: TPGroup | None = None, agree: Callable[[int], int] | None = None
    ) -> None:
        self.config = config = resolve(config, detect())
        if tp is None and config.tp_size > 1:
            raise ConfigError(f"tp is {config.tp_size}, and an Engine is one rank; LLM or make_engine start the others")
        self.tp = tp or TPGroup()
        self.device = rank_device(config, self.tp.rank)
        with explained():
            self._start(config, agree)
        if use_nvtx():
            add_spans(self.model, self.runner.attention)
        self.lag = 1 if config.overlap else 0
        self.vocab_size = self.model.config.vocab_size
        self.max_total_tokens = self.scheduler.max_total_tokens
        self._in_flight: deque[StepHandle] = deque()
        self._pending: list[TokenOutput] = []  # terminal outputs that no step brings
        log.info("engine ready: %s, at most %d tokens a request", config, self.max_total_tokens)

    def _start(self, config: EngineConfig, agree: Callable[[int], int] | None) -> None:
        """Loads the model, shares out the memory, captures graphs."""
        dtype = getattr(torch, config.dtype)
        with phase("model"):
            self.model = load_model(
                Path(resolve_model(config.model)), dtype, self.device, self.tp, config.dummy_weights, config.seed,
                progress=self.tp.rank == 0, packed=config.attention == "cpu", fused=config.fused_kernels == "on",
            )  # fmt: skip
        longest = self.model.config.max_position
        context = config.max_model_len or longest
        if context > longest:
            raise ModelError(f"max-model-len is {context}; the model's context has {longest} tokens")
        attention = make_attention(config.attention)
        sizes, prompts = self._graph_sizes(config, attention)
        trial, budget = self._make_pool(config, 1), None
        attention.check(trial)
        if config.device == "cuda" and config.num_pages is None:
            with phase("memory budget"):
                budget = measure(self.model, trial, attention, config, context, sizes, prompts)
        num_pages = choose_num_pages(config, self.model.config, dtype, trial.page_bytes, context, budget)
        if agree is not None:
            num_pages = agree(num_pages)
        pool = self._make_pool(config, num_pages)
        assert config.max_running is not None and config.max_batched_tokens is not None
        cache = make_prefix_cache(config.page_size) if config.prefix_cache else None
        self.scheduler = Scheduler(
            num_pages, config.page_size, config.max_running, config.max_batched_tokens, context, cache, config.policy
        )
        most = self.scheduler.max_total_tokens
        self.runner = ModelRunner(self.model, pool, attention, config.max_running, most, config.seed)
        if sizes:
            with phase("graphs"):
                self.runner.capture(sizes, prompts, progress=self.tp.rank == 0)

    def _graph_sizes(self, config: EngineConfig, attention: AttentionBackend) -> tuple[list[int], list[int]]:
        """Batches that get CUDA graphs, and numbers of prompts' tokens that do."""
        assert config.max_running is not None and config.max_batched_tokens is not None
        if config.device != "cuda" or not (config.cuda_graph and attention.capturable and self.model.capturable):
            return [], []
        alone = attention.captures_prompts and self.tp.size == 1
        prompts = prompt_sizes(config.max_batched_tokens, self.model.config.hidden_size) if alone else []
        return batch_sizes(min(config.max_running, config.cuda_graph_max_batch or config.max_running)), prompts

    def _make_pool(self, config: EngineConfig, num_pages: int) -> KVPool:
        c, heads = self.model.config, self.model.num_kv_heads_per_rank
        dtype = FP8 if config.kv_cache_dtype == "fp8" else getattr(torch, config.dtype)
        pool = KVPool(c.num_layers, heads, c.head_dim, config.page_size, num_pages, dtype, self.device)
        if pool.quantised:
            pool.set_scales(*kv_scales(self.model))
        return pool

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, request_id: str, prompt: array[int], params: SamplingParams, priority: int = 0) -> None:
        """Queues a request.

        Args:
            prompt: array('i') of token ids.
            params: as `SamplingParams.resolve` gives them.

        Raises:
            RequestError: it can't be served; nothing was queued.
        """
        # as unsigned numbers, negative ones are too large as well; Python's min and max take ten times as long
        if prompt and np.frombuffer(prompt, np.uint32).max() >= self.vocab_size:
            check_ids(prompt, self.vocab_size, "prompt")
        check_ids(params.logit_bias, self.vocab_size, "logit_bias")
        check_ids(params.stop_token_ids, self.vocab_size, "stop_token_ids")
        request = Request(request_id, array("i", prompt), params, priority)
        self.scheduler.add(request)
        if params.prompt_logprobs:
            self.runner.prompt_logprobs[request_id] = []
        if request.max_total == request.num_prompt:  # max_tokens=0: nothing to compute
            self.scheduler.finish(request, FinishReason.LENGTH)
            self._pending.append(TokenOutput(request_id, [], finish=FinishReason.LENGTH))

    def finish(self, request_id: str) -> None:
        """Ends a request whose stop string was seen; nothing more is sent of it. Unknown ids are ignored."""
        request = self.scheduler.requests.get(request_id)
        if request is not None:
            self._drop(request, FinishReason.STOP)

    def abort(self, request_id: str) -> None:
        """Ends a request that nobody waits for; its terminal output comes with the next step."""
        request = self.scheduler.requests.get(request_id)
        if request is not None:
            self._drop(request, FinishReason.ABORT)
            self._pending.append(TokenOutput(request_id, [], finish=FinishReason.ABORT))

    def _drop(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason)
        self.runner.prompt_logprobs.pop(request.id, None)

    # -- steps ---------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.requests or self._in_flight or self._pending)

    def step(self) -> list[TokenOutput]:
        """Launches the next step, collects the one that is due, and returns what requests gained."""
        with span("schedule"):
            batch = self.scheduler.schedule()
        if batch.requests:
            self._in_flight.append(self.runner.launch(batch))
        outputs, self._pending = self._pending, []
        # with nothing launched, what is in flight must end: it holds what the waiting ones need
        while len(self._in_flight) > (self.lag if batch.requests else 0):
            outputs += self._collect(self._in_flight.popleft())
        return outputs

    def _collect(self, handle: StepHandle) -> list[TokenOutput]:
        with span("collect"):
            result = self.runner.collect(handle)
        those = self.scheduler.collect(handle.batch, result.tokens)
        if not (result.logprobs or self.runner.prompt_logprobs):  # most steps, and most of a decode step's time here
            return [TokenOutput(r.id, [r.tokens[-1]], _NONE, r.finish_reason, None, r.num_cached, _NONE) for r in those]
        place = {r.id: i for i, r in enumerate(handle.requests)}
        return [self._output(request, place, result) for request in those]

    def _output(self, request: Request, place: dict[str, int], result: StepResult) -> TokenOutput:
        """As `_collect`'s plain case, with what only some requests want."""
        unwanted = request.params.max_tokens == 0
        self.scheduler.output_tokens -= unwanted
        logprob = result.logprobs.get(place.get(request.id, -1))
        first = request.params.prompt_logprobs and request.num_output == 1
        return TokenOutput(
            request.id, [] if unwanted else [request.tokens[-1]], [logprob] if logprob and not unwanted else [],
            FinishReason.LENGTH if unwanted else request.finish_reason, num_cached=request.num_cached,
            prompt_logprobs=self.runner.prompt_logprobs.pop(request.id) if first else [],
        )  # fmt: skip

    def stats(self) -> EngineStats:
        s, ledger = self.scheduler, self.scheduler.ledger
        return EngineStats(
            num_waiting=len(s.waiting), num_running=len(s.running),
            num_pages=ledger.num_pages, num_free_pages=len(ledger.free),
            num_cached_pages=ledger.cache.num_pages if ledger.cache else 0,
            num_evictable_pages=ledger.cache.num_evictable_pages if ledger.cache else 0,
            prompt_tokens=s.prompt_tokens, cached_tokens=s.cached_tokens, output_tokens=s.output_tokens,
            preemptions=s.preemptions, steps=s.step,
        )  # fmt: skip

    def close(self) -> None:
        """Lets go of what would keep the ranks' communicator from ending: graphs that hold its calls."""
        self.runner.graphs = self.runner.prompt_graphs = None
