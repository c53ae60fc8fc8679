"""Decode steps over device-resident rows: the work that a CUDA graph captures, run as it is on a CPU, and replayed on
a GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import GREEDY, Driver
from tiny import greedy, make_checkpoint
from torch import Tensor

from minisgl.attention import AttentionBackend, ForwardBatch
from minisgl.engine.graphs import DecodeGraphs, DecodeStep, batch_sizes
from minisgl.engine.sampler import Way
from minisgl.timing import collector_off

PROMPTS = [[(7 * i + 3 * k) % 60 + 2 for i in range(5 + 11 * k)] for k in range(5)]


class DeviceOnly(AttentionBackend):
    """Attention written out, from nothing but the batch's tensors."""

    name = "device_only"
    capturable = True
    short_context = 40

    def forward(self, q: Tensor, layer: int, batch: ForwardBatch, scale: float, window: int | None) -> Tensor:
        keys, values = batch.pool.k[layer], batch.pool.v[layer]
        out = torch.empty_like(q)
        starts = batch.query_starts.tolist()
        rows = range(len(starts) - 1) if batch.table_rows is None else batch.table_rows.tolist()
        for i, (row, length) in enumerate(zip(rows, batch.seq_lens.tolist(), strict=True)):
            assert length <= batch.page_table.shape[1] * batch.pool.page_size
            k, v = (x[batch.page_table[row].long()].flatten(0, 1)[:length] for x in (keys, values))
            queries = q[starts[i] : starts[i + 1]]
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("qhd,khd->hqk", queries, k.repeat_interleave(group, 1)) * scale
            position = torch.arange(length - len(queries), length)[:, None]
            hidden = torch.arange(length) > position
            if window is not None:
                hidden |= torch.arange(length) <= position - window
            probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[starts[i] : starts[i + 1]] = torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(group, 1))
        return out


class Replayed:
    """Stands for a CUDA graph: does the work again, into the same memory."""

    def __init__(self, work: Any) -> None:
        self.replay = work


class Uncaptured(DecodeGraphs):
    """The same steps without a GPU."""

    def _capture(self, step: DecodeStep, memory: Any) -> Any:
        from minisgl.engine.graphs import Captured

        self.mail.reset(step.size)
        logits = step.run()
        plain: Any = Replayed(lambda: logits.copy_(step.run()))
        filtered: Any = Replayed(partial(step.sample, logits, True))
        return Captured(step, plain, filtered, logits), None


def _driver(
    folder: Path, overlap: bool, page_size: int, max_batch: int = 8, **options: Any
) -> tuple[Driver, list[int]]:
    """A driver whose decodes go through uncaptured steps, and the sizes of the batches that did."""
    options["attention"] = "torch_sdpa"  # layers that ask the backend
    driver = Driver(folder, overlap=overlap, page_size=page_size, **options)
    runner = driver.engine.runner
    runner.attention = DeviceOnly()
    with torch.inference_mode():
        runner.graphs = Uncaptured(
            runner.model, runner.pool, runner.attention, runner.rows, batch_sizes(max_batch), False
        )
    replayed: list[int] = []
    replay = runner.graphs.replay

    def record(batch: Any, way: Way) -> Any:
        replayed.append(len(batch.requests))
        return replay(batch, way)

    runner.graphs.replay = record  # type: ignore[method-assign]
    return driver, replayed


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    folder = tmp_path_factory.mktemp("model")
    model = make_checkpoint(request.param, folder)
    return folder, [greedy(model, prompt, 30) for prompt in PROMPTS]


@pytest.mark.parametrize("overlap", [False, True], ids=["lag0", "lag1"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_decode_step_gives_the_tokens_of_transformers(
    oracle: tuple[Path, list[list[int]]], overlap: bool, page_size: int
) -> None:
    folder, expected = oracle
    driver, replayed = _driver(folder, overlap, page_size)
    ids = [driver.add(prompt, replace(GREEDY, max_tokens=30)) for prompt in PROMPTS[:3]]
    for _ in range(6):
        driver.step()
    ids += [driver.add(prompt, replace(GREEDY, max_tokens=30)) for prompt in PROMPTS[3:]]
    driver.run()
    assert [driver.answers[id].tokens for id in ids] == expected
    assert {3, 5} <= set(replayed), "padded and whole batches were replayed"
    graphs = driver.engine.runner.graphs
    assert graphs is not None and len(graphs.widths) == 2, "answers grow from the narrow page table into the wide one"
    driver.close()


@pytest.mark.parametrize("overlap", [False, True], ids=["lag0", "lag1"])
def test_decode_step_waits_for_the_end_of_a_prompt(oracle: tuple[Path, list[list[int]]], overlap: bool) -> None:
    """A prompt's last token may come alone, and looks like a decode then."""
    folder, expected = oracle
    driver, replayed = _driver(folder, overlap, 4, max_running=1, max_batched_tokens=1)
    assert driver.ask(PROMPTS[1], replace(GREEDY, max_tokens=30)).tokens == expected[1]
    assert len(replayed) == 29


def test_decode_step_serves_rows_that_want_more(oracle: tuple[Path, list[list[int]]]) -> None:
    """Filters, penalties, seeds and log-probabilities: the same answers as without graphs."""
    folder, _ = oracle
    wanted = [
        replace(GREEDY, max_tokens=20, presence_penalty=1.5),
        replace(GREEDY, max_tokens=20, logprobs=True, top_logprobs=2),
        replace(GREEDY, max_tokens=20, temperature=1.0, top_p=0.8, top_k=20, seed=3),
        replace(GREEDY, max_tokens=20, temperature=0.9, seed=4),
    ]
    plain, (driver, replayed) = Driver(folder), _driver(folder, True, 4)
    answers = []
    for one in (plain, driver):
        ids = [one.add(prompt, params) for prompt, params in zip(PROMPTS, wanted, strict=False)]
        one.run()
        answers.append([one.answers[id] for id in ids])
    assert replayed
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]
    top = [[entry.top for o in a[1].outputs for entry in o.logprobs] for a in answers]
    assert [[i for i, _ in entry] for entry in top[0]] == [[i for i, _ in entry] for entry in top[1]]


def test_decode_step_filters_in_its_own_graph(
    oracle: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = oracle
    wanted = [
        replace(GREEDY, max_tokens=20, temperature=1.0, top_p=0.8, seed=3),
        replace(GREEDY, max_tokens=20, temperature=0.9, top_k=5, min_p=0.1, seed=4),
        replace(GREEDY, max_tokens=20),
    ]
    plain, (driver, replayed) = Driver(folder), _driver(folder, True, 4)
    eager: list[int] = []
    sample = driver.engine.runner._sample
    monkeypatch.setattr(driver.engine.runner, "_sample", lambda handle, *rest: (eager.append(1), sample(handle, *rest)))
    answers = []
    for one in (plain, driver):
        ids = [one.add(prompt, params) for prompt, params in zip(PROMPTS, wanted, strict=False)]
        one.run()
        answers.append([one.answers[id].tokens for id in ids])
    assert answers[0] == answers[1]
    assert len(eager) == 1 and len(replayed) >= 19, "the prompts' step alone sampled eagerly"


def test_decode_step_survives_preemption(oracle: tuple[Path, list[list[int]]]) -> None:
    folder, expected = oracle
    driver, replayed = _driver(folder, True, 4, num_pages=28)
    ids = [driver.add(prompt, replace(GREEDY, max_tokens=30)) for prompt in PROMPTS]
    driver.run()
    assert driver.engine.stats().preemptions > 0 and replayed
    assert [driver.answers[id].tokens for id in ids] == expected
    driver.close()


def test_ladder_wastes_little_and_ends_at_the_largest() -> None:
    for largest in (1, 5, 64, 100, 256):
        sizes = batch_sizes(largest)
        assert sizes[-1] == largest and sizes == sorted(set(sizes))
        for batch in range(17, largest + 1):
            assert next(s for s in sizes if s >= batch) < 1.5 * batch


class _Finalised:
    """Garbage that only the collector finds, and that tells when it did."""

    def __init__(self, found: list[bool]) -> None:
        self.found, self.own = found, self

    def __del__(self) -> None:
        self.found.append(gc.isenabled())


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Python's collector runs at every second allocation."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("fails", [False, True])
def test_capture_keeps_the_collector_out(
    oracle: tuple[Path, list[list[int]]], eager_collector: None, fails: bool
) -> None:
    """What it frees may be the CUDA graphs of an engine let go before, which would break off the capture."""
    found: list[bool] = []
    in_capture: list[int] = []

    class Littering(Uncaptured):
        def _capture(self, step: DecodeStep, memory: Any) -> Any:
            _Finalised(found)
            garbage = [[i] for i in range(1000)]
            in_capture.append(len(found))
            if fails and len(in_capture) == 2:
                raise RuntimeError(f"captured no more than {len(garbage)}")
            return super()._capture(step, memory)

    driver = Driver(oracle[0], attention="torch_sdpa")  # layers that ask the backend
    runner = driver.engine.runner
    with torch.inference_mode(), pytest.raises(RuntimeError) if fails else nullcontext():
        Littering(runner.model, runner.pool, DeviceOnly(), runner.rows, [1, 2, 3], False)
    assert in_capture and not any(in_capture), "nothing was freed while graphs were captured"
    assert gc.isenabled()
    gc.collect()
    assert len(found) == len(in_capture) and all(found)
    driver.close()


def test_collector_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with collector_off():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


class LitteringGraphs(DecodeGraphs):
    """Lets go of a CUDA graph, which only the collector finds, in the middle of every capture."""

    def _capture(self, step: DecodeStep, memory: Any) -> Any:
        graphs = [torch.cuda.CUDAGraph() for _ in range(4)]
        for graph in graphs:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                torch.zeros(1, device="cuda")
        sample = step.sample

        def litter(*args: Any) -> None:
            cycle: list[Any] = [graphs.pop()]
            cycle.append(cycle)
            del cycle
            sample(*args)

        step.sample = litter  # type: ignore[method-assign]
        return super()._capture(step, memory)


@pytest.mark.cuda
def test_capture_survives_garbage_and_other_threads(
    oracle: tuple[Path, list[list[int]]], eager_collector: None
) -> None:
    folder, expected = oracle
    driver = Driver(folder, device="cuda", dtype="float32", attention="triton")
    runner = driver.engine.runner
    held: list[Tensor] = []
    done = threading.Event()

    def allocate() -> None:
        while not done.is_set() and len(held) < 200:
            held.append(torch.empty(2**21 + len(held), dtype=torch.uint8, device="cuda"))
            torch.cuda.Event().query()

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        runner.graphs = LitteringGraphs(runner.model, runner.pool, runner.attention, runner.rows, [1, 2, 4], False)
    finally:
        done.set()
        thread.join()
    assert driver.ask(PROMPTS[1], replace(GREEDY, max_tokens=30)).tokens == expected[1]
