"""Spans around a model's operators: all of them, in their layers, and nothing left behind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from harness import Driver

from minisgl.kernels import cpu
from minisgl.models.spans import add_spans
from minisgl.profiling.decoder_marks import watch_operators
from minisgl.timing import set_span_hook, span, use_nvtx
from minisgl.types import ConfigError

PROMPT = [5, 3, 9, 2, 7]
OPERATORS = ("qkv", "rope+store", "attention", "o", "gate/up", "silu*mul", "down")


class Names:
    """A hook that keeps the path of every span."""

    def __init__(self) -> None:
        self.paths: list[tuple[str, ...]] = []
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self.paths.append(tuple(self._open))
        yield
        self._open.pop()


@pytest.fixture
def names() -> Iterator[Names]:
    names = Names()
    set_span_hook(names)
    yield names
    set_span_hook(None)


def test_span_without_a_hook_is_one_shared_nothing() -> None:
    assert span("a") is span("b")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_spans_cover_every_operator_of_every_layer(checkpoint, family: str, names: Names) -> None:
    driver = Driver(checkpoint(family)[0], attention="torch_sdpa", dtype="float32", overlap=False)
    model, attention = driver.engine.model, driver.engine.runner.attention
    set_span_hook(None)
    plain = driver.ask(PROMPT).tokens[:4]
    before = {name: set(vars(m)) for name, m in model.named_modules()}

    set_span_hook(names)
    remove = add_spans(model, attention)
    assert driver.ask(PROMPT).tokens[:4] == plain
    remove()
    seen = len(names.paths)
    steps = sum(path[-1] == "forward" for path in names.paths)
    for i in range(len(model.layers)):
        inner = Counter(path[-1] for path in names.paths if f"layer {i}" in path)
        assert inner["rmsnorm"] == 2 * steps
        assert {name: inner[name] for name in OPERATORS} == dict.fromkeys(OPERATORS, steps)
    last = Counter(path[-1] for path in names.paths)
    assert last["embedding"] == last["lm head"] == steps
    assert ("schedule", "radix match") in names.paths

    driver.ask(PROMPT)
    assert not any("layer 0" in path for path in names.paths[seen:]), "the spans stayed"
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before


def test_spans_put_twice_come_off_one_by_one(checkpoint, names: Names) -> None:
    driver = Driver(checkpoint("llama")[0], attention="torch_sdpa", dtype="float32")
    first = add_spans(driver.engine.model, driver.engine.runner.attention)
    second = add_spans(driver.engine.model, driver.engine.runner.attention)
    second()
    driver.ask(PROMPT)
    assert any(path[-1] == "qkv" for path in names.paths)
    first()
    names.paths.clear()
    driver.ask(PROMPT)
    assert not any(path[-1] == "qkv" for path in names.paths)


@pytest.mark.skipif(not cpu.available(), reason="needs the C++ extension")
def test_operators_inside_the_cpp_decoder_are_marked_in_order(checkpoint) -> None:
    driver = Driver(checkpoint("qwen3")[0], attention="cpu", overlap=False)
    plain = driver.ask(PROMPT).tokens
    model, marks = driver.engine.model, []
    remove = watch_operators(model, driver.engine.runner.attention, lambda *mark: marks.append(mark))
    began = time.perf_counter_ns()
    id = driver.add(PROMPT)
    driver.step()
    ended = time.perf_counter_ns()
    remove()
    count = len(marks)
    names = [name for name, _, _ in marks]
    per_layer = ["rmsnorm", "qkv", "rope+store", "attention", "o", "rmsnorm", "gate/up", "silu*mul", "down"]
    layers = [name for i in range(len(model.layers)) for name in (f"layer {i}", *per_layer)]
    assert names == ["embedding", *layers, "rmsnorm"]
    leaves = [mark for mark in marks if not mark[0].startswith("layer")]
    assert all(one[2] == other[1] for one, other in pairwise(leaves)), "no gap between operators"
    assert began <= leaves[0][1] and leaves[-1][2] <= ended, "the clock is that of time.perf_counter_ns"
    driver.run()
    assert len(marks) == count and driver.answers[id].tokens == plain


def test_nvtx_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0"):
        monkeypatch.setenv("MINISGL_NVTX", value)
        assert not use_nvtx()
    monkeypatch.setenv("MINISGL_NVTX", "yes")
    with pytest.raises(ConfigError, match="expected 1"):
        use_nvtx()
    monkeypatch.setenv("MINISGL_NVTX", "1")
    if torch.version.cuda is None:
        with pytest.raises(ConfigError, match="no NVTX"):
            use_nvtx()
    else:
        try:
            assert use_nvtx()
        finally:
            set_span_hook(None)


@pytest.mark.cuda
def test_nvtx_ranges_leave_the_tokens_as_they_are(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options = checkpoint("qwen3")[0], {"device": "cuda", "dtype": "float32"}
    plain = Driver(folder, **options).ask(PROMPT).tokens
    monkeypatch.setenv("MINISGL_NVTX", "1")
    try:
        assert Driver(folder, **options).ask(PROMPT).tokens == plain
    finally:
        set_span_hook(None)
