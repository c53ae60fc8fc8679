"""`LLM.run`, and what Ctrl-C leaves behind, on a model with one layer of random weights."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from servers import make_model

from minisgl import LLM, SamplingParams
from minisgl.engine.ledger import PageLedger
from minisgl.messages import TokenOutput
from minisgl.types import FinishReason, Request, RequestError, RequestOutput

MAX_RUNNING = 4


def tokens(num: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = make_model(tmp_path_factory.mktemp("tiny"))
    return LLM(str(folder), device="cpu", dummy_weights=True, num_pages=200, max_running=MAX_RUNNING)


@pytest.fixture(autouse=True)
def _leaves_nothing(llm: LLM) -> Iterator[None]:
    yield
    llm.generate("x", tokens(1))
    stats = llm.engine.stats()
    assert stats.num_running + stats.num_waiting == 0
    assert stats.num_free_pages + stats.num_evictable_pages == stats.num_pages
    assert not llm._inbox


def test_run_gives_what_generate_gives(llm: LLM) -> None:
    wanted = {f"key {i}": (f"Prompt number {i}", tokens(3 + i % 5)) for i in range(20)}
    results = dict(llm.run((key, *request) for key, request in wanted.items()))
    assert results.keys() == wanted.keys()
    for key, (prompt, params) in wanted.items():
        [alone] = llm.generate(prompt, params)
        assert isinstance(results[key], RequestOutput)
        assert (results[key].text, results[key].token_ids) == (alone.text, alone.token_ids)
        assert results[key].prompt == prompt


def test_run_yields_the_quickest_first(llm: LLM) -> None:
    lengths = [30, 4, 12]
    order = [key for key, _ in llm.run((n, "Once", tokens(n)) for n in lengths)]
    assert order == sorted(lengths)


def test_run_takes_requests_only_as_room_comes_free(llm: LLM) -> None:
    taken: list[int] = []

    def source() -> Iterator[tuple[int, str, SamplingParams]]:
        for i in range(40):
            taken.append(i)
            yield i, f"Prompt {i}", tokens(4)

    for num_done, (_, result) in enumerate(llm.run(source(), max_in_flight=6)):
        assert isinstance(result, RequestOutput)
        assert len(taken) <= num_done + 6
    assert len(taken) == 40


def test_run_keeps_the_engine_full(llm: LLM) -> None:
    running = []
    for key, _ in llm.run((i, f"Prompt {i}", tokens(8)) for i in range(40)):
        if key < 30:
            running.append(llm.engine.stats().num_running + llm.engine.stats().num_waiting)
    assert min(running) >= MAX_RUNNING


def test_run_yields_refusals_and_goes_on(llm: LLM) -> None:
    requests = [(0, "fine", tokens(2)), (1, [10**6], tokens(2)), (2, "", None), (3, "x" * 5000, None)]
    requests += [(4, [{"role": "tool", "content": ""}], None), (5, [1, 2, 3], tokens(2, n=2))]
    results = dict(llm.run(requests, max_in_flight=1))
    assert {key for key, result in results.items() if isinstance(result, RequestError)} == {1, 2, 3, 4}
    assert "outside the vocabulary" in str(results[1])
    assert "no tools, please" in str(results[4])
    answers = results[5].completions
    assert [a.index for a in answers] == [0, 1] and all(len(a.token_ids) == 2 for a in answers)


def test_run_of_nothing_yields_nothing(llm: LLM) -> None:
    assert list(llm.run([])) == []


def test_run_closed_early_ends_its_requests(llm: LLM) -> None:
    results = llm.run((i, "Once", tokens(5 if i == 0 else 1000)) for i in range(10))
    assert next(results)[0] == 0
    results.close()  # type: ignore[attr-defined]


def test_run_takes_conversations_and_the_models_defaults(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    [(_, result)] = llm.run([("chat", messages, tokens(3))])
    assert isinstance(result, RequestOutput)
    assert result.prompt_token_ids == llm.chat(messages, tokens(3))[0].prompt_token_ids


def test_run_and_streams_share_the_engine(llm: LLM) -> None:
    alone = "".join(d.text for d in llm.stream("Once upon", tokens(20)))
    stream = llm.stream("Once upon", tokens(20))
    text = next(stream).text
    assert len(list(llm.run((i, f"Prompt {i}", tokens(6)) for i in range(8)))) == 8
    assert text + "".join(d.text for d in stream) == alone


def test_stream_never_read_is_ended_by_closing(llm: LLM) -> None:
    llm.stream("Once", tokens(1000)).close()


class Interrupting:
    """Makes Ctrl-C arrive in the middle of the engine's n-th step from now."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
        self.left, self.ended_steps = nth, 0
        self._step = llm.engine.step
        monkeypatch.setattr(llm.engine, "step", self)

    def __call__(self) -> list[TokenOutput]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        outputs = self._step()
        self.ended_steps += 1
        return outputs


def test_ctrl_c_takes_effect_when_the_step_has_ended(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    steps = Interrupting(llm, monkeypatch, nth=5)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Once", "upon"], tokens(100))
    assert steps.ended_steps == 5
    assert signal.getsignal(signal.SIGINT) is before
    [result] = llm.generate("Once", tokens(5))
    assert result.finish_reason is FinishReason.LENGTH


def test_ctrl_c_ends_run_and_stream(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (lambda: llm.run((i, "Once", tokens(100)) for i in range(9)), lambda: llm.stream("Once", tokens(100))):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Interrupting(llm, patch, nth=3)
            for _ in start():
                pass


def test_ctrl_c_while_a_request_is_added_leaves_none(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add = llm.engine.add

    def interrupted(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        add(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.engine, "add", interrupted)
        llm.stream("Once", tokens(1000))


def test_llm_works_in_another_thread(llm: LLM) -> None:
    results: list[RequestOutput] = []
    thread = threading.Thread(target=lambda: results.extend(llm.generate("Once", tokens(4))))
    thread.start()
    thread.join()
    assert len(results[0].token_ids) == 4


def test_ctrl_c_while_the_tokens_are_being_read_lets_them_grow(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal brings the frame that it interrupted, and with it a view of the request's tokens."""
    admit, seen = PageLedger.admit, []

    def interrupted(ledger: PageLedger, request: Request, watermark: int) -> bool:
        view = np.frombuffer(request.tokens, np.int32)
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(len(view))
        return admit(ledger, request, watermark)

    monkeypatch.setattr(PageLedger, "admit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("Hello", tokens(4))
    assert seen
    monkeypatch.undo()
    [result] = llm.generate("Hello", tokens(4))
    assert len(result.token_ids) == 4
