"""The output processor against a definition over whole texts, and its rules one by one."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisgl.messages import TokenOutput
from minisgl.text import OutputProcessor, Tokenizer
from minisgl.types import FinishReason, RequestError, SamplingParams, TextDelta, TokenLogprob

PROMPT = [1, 7, 8]
EOS = 2
text_settings = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["byte_level", "metaspace"], scope="module")
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param), {})


@pytest.fixture(scope="module")
def plain(byte_level) -> Tokenizer:
    return Tokenizer(byte_level, {})


def start(tokenizer: Tokenizer | None, **params) -> OutputProcessor:
    processor = OutputProcessor(tokenizer)
    processor.add("r", PROMPT, SamplingParams(**params).resolve({}, (EOS,)))
    return processor


def feed(processor: OutputProcessor, tokens, finish: FinishReason | None = None, **more) -> tuple[TextDelta, list[str]]:
    (delta,), stopped = processor.process([TokenOutput("r", list(tokens), finish=finish, **more)])
    return delta, stopped


def one_by_one(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for every byte of `text`."""
    of_byte = {tokenizer.token_bytes(i): i for i in range(4, 260)}
    return [of_byte[bytes([b])] for b in text.encode()]


def naive(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[str, int, str | None]:
    """Text, tokens counted and stop string if `ids` are all there is: looks at whole decodes only."""
    texts = [tokenizer.decode([*PROMPT, *ids[:n]]) for n in range(len(ids) + 1)]
    whole = texts[-1][len(texts[0]) :]

    def shown(n: int) -> str:  # as much of the final text as n tokens settle
        if n == len(ids):
            return whole
        if tokenizer.byte_fallback and n and ids[n - 1] in range(4, 260):
            return shown(n - 1)  # a run of byte tokens is read at its end
        return texts[n][len(texts[0]) :].rstrip("\ufffd")

    for end in range(1, len(whole) + 1):
        count = next(n for n in range(len(ids) + 1) if len(shown(n)) >= end)
        found = [s for s in params.stop if whole[:end].endswith(s)]
        if found and count > params.min_tokens:
            stop = max(found, key=len)
            return whole[: end - len(stop)], count, stop
    return whole, len(ids), None


@text_settings(max_examples=300)
@given(data=st.data(), text=st.text(alphabet="ab the.\n京🙂", min_size=1, max_size=25), min_tokens=st.integers(0, 5))
def test_deltas_add_up_to_what_the_definition_says(tokenizer: Tokenizer, data, text: str, min_tokens: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    at = data.draw(st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(1, 5)), max_size=3))
    params = SamplingParams(stop=tuple(text[a : a + n] for a, n in at), min_tokens=min_tokens).resolve({}, (EOS,))
    expected, counted, stop = naive(tokenizer, ids, params)
    processor = OutputProcessor(tokenizer)
    processor.add("r", PROMPT, params)
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=20))
    got, left = [], ids
    for size in [*sizes, len(ids)]:
        if not left:
            break
        piece, left = left[:size], left[size:]
        finish = None if left else FinishReason.LENGTH
        logprobs = [TokenLogprob(i, -0.5) for i in piece]
        deltas, stopped = processor.process([TokenOutput("r", piece, logprobs=logprobs, finish=finish)])
        got += deltas
        early = bool(deltas) and deltas[0].finish_reason is not None and finish is None
        assert stopped == (["r"] if early else [])
    assert "".join(d.text for d in got) == expected
    assert [i for d in got for i in d.token_ids] == ids[:counted]
    assert all([p.token_id for p in d.logprobs] == d.token_ids for d in got)
    last = got[-1]
    assert [d.finish_reason is not None for d in got] == [False] * (len(got) - 1) + [True]
    assert (last.finish_reason, last.stop_reason) == (
        (FinishReason.STOP, stop) if stop else (FinishReason.LENGTH, None)
    )
    assert (last.num_output, last.num_prompt) == (counted, len(PROMPT))
    assert len(processor) == 0


def test_stop_string_over_tokens_never_leaks_and_ends_the_engine_request(plain) -> None:
    processor = start(plain, stop=["</x>"])
    ids = one_by_one(plain, "ab</x>cd")
    deltas = [feed(processor, [i]) for i in ids[:6]]
    assert [d.text for d, _ in deltas] == ["a", "b", "", "", "", ""]
    assert [s for _, s in deltas] == [[], [], [], [], [], ["r"]]
    last = deltas[-1][0]
    assert (last.finish_reason, last.stop_reason, last.num_output) == (FinishReason.STOP, "</x>", 6)
    assert processor.process([TokenOutput("r", ids[6:]), TokenOutput("r", [], finish=FinishReason.STOP)]) == ([], [])


def test_tokens_after_a_stop_string_in_the_same_output_are_dropped_uncounted(plain) -> None:
    processor = start(plain, stop=["b"])
    ids = one_by_one(plain, "abcd")
    logprobs = [TokenLogprob(i, -1.0) for i in ids]
    delta, stopped = feed(processor, ids, logprobs=logprobs)
    assert (delta.text, delta.token_ids, delta.logprobs, delta.num_output) == ("a", ids[:2], logprobs[:2], 2)
    assert stopped == ["r"]


def test_stop_string_that_meets_the_end_of_the_request_needs_no_finish(plain) -> None:
    delta, stopped = feed(start(plain, stop=["b"]), one_by_one(plain, "ab"), FinishReason.LENGTH)
    assert (delta.finish_reason, delta.stop_reason, stopped) == (FinishReason.STOP, "b", [])


def test_first_complete_stop_string_wins(plain) -> None:
    delta, _ = feed(start(plain, stop=["cd", "bcde", "zz"]), one_by_one(plain, "abcdef"))
    assert (delta.text, delta.stop_reason) == ("ab", "cd")
    delta, _ = feed(start(plain, stop=["d", "bcd"]), one_by_one(plain, "abcdef"))
    assert (delta.text, delta.stop_reason) == ("a", "bcd")


def test_stop_token_is_counted_but_is_no_text(plain) -> None:
    letter = one_by_one(plain, "x")[0]
    for stop_id in (EOS, letter):
        processor = start(plain, stop_token_ids=[letter], skip_special_tokens=False)
        delta, stopped = feed(processor, [*one_by_one(plain, "ab"), stop_id], FinishReason.STOP)
        assert (delta.text, delta.stop_reason, delta.num_output) == ("ab", stop_id, 3)
        assert (delta.token_ids[-1], stopped) == (stop_id, [])


def test_eos_that_is_ignored_stays_in_the_text(plain) -> None:
    processor = start(plain, ignore_eos=True, skip_special_tokens=False)
    assert feed(processor, [EOS])[0].text == "</s>"


def test_text_held_back_comes_with_the_end(plain) -> None:
    for finish in (FinishReason.LENGTH, FinishReason.ABORT):
        processor = start(plain, stop=["bcd"])
        assert feed(processor, one_by_one(plain, "abc"))[0].text == "a"
        assert feed(processor, [], finish)[0].text == "bc"
    processor = start(plain)
    assert feed(processor, one_by_one(plain, "é")[:1])[0].text == ""
    assert feed(processor, [EOS], FinishReason.STOP)[0].text == "\ufffd"


def test_stop_string_in_the_last_run_of_byte_tokens_is_found(metaspace) -> None:
    tokenizer = Tokenizer(metaspace, {})
    ids = tokenizer.encode("a🙂é", add_special_tokens=False)
    delta, _ = feed(start(tokenizer, stop=["🙂"]), ids, FinishReason.LENGTH)
    assert (delta.text.strip(), delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "🙂")


def test_stop_strings_within_min_tokens_do_not_count(plain) -> None:
    delta, _ = feed(start(plain, stop=["b"], min_tokens=3), one_by_one(plain, "abbbc"))
    assert (delta.text, delta.num_output) == ("abb", 4)
    delta, _ = feed(start(plain, stop=["bc"], min_tokens=2), one_by_one(plain, "abcd"))
    assert (delta.text, delta.num_output) == ("a", 3)  # begun within, complete beyond


def test_num_cached_stays_once_known(plain) -> None:
    processor = start(plain)
    assert feed(processor, [5], num_cached=2)[0].num_cached == 2
    assert feed(processor, [5])[0].num_cached == 2


def test_engine_error_ends_the_request_with_its_text(plain) -> None:
    processor = start(plain)
    delta, stopped = feed(processor, [], FinishReason.ERROR, error="out of pages")
    assert (delta.finish_reason, delta.error, stopped) == (FinishReason.ERROR, "out of pages", [])
    assert len(processor) == 0


def test_abort_ends_a_request_once(plain) -> None:
    processor = start(plain, stop=["bx"])
    feed(processor, one_by_one(plain, "ab"))
    delta = processor.abort("r")
    assert (delta.text, delta.finish_reason, delta.num_output) == ("b", FinishReason.ABORT, 2)
    assert processor.abort("r") is None
    assert processor.process([TokenOutput("r", [], finish=FinishReason.ABORT)]) == ([], [])


def test_requests_do_not_mix(plain) -> None:
    processor = OutputProcessor(plain)
    ids = {"r": one_by_one(plain, "東"), "s": one_by_one(plain, "京")}
    for name in ids:
        processor.add(name, PROMPT, SamplingParams())
    texts = {"r": "", "s": ""}
    for a, b in zip(*ids.values(), strict=True):
        for delta in processor.process([TokenOutput("r", [a]), TokenOutput("s", [b])])[0]:
            texts[delta.request_id] += delta.text
    assert texts == {"r": "東", "s": "京"}


def test_without_a_tokenizer_there_are_ids_and_no_text() -> None:
    delta, _ = feed(start(None), [5, 6, EOS], FinishReason.STOP)
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("", [5, 6, EOS], EOS)
    with pytest.raises(RequestError, match="no tokenizer") as caught:
        start(None, stop=["x"])
    assert caught.value.param == "stop"
