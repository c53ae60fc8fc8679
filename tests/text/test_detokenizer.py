"""Incremental detokenization against decoding everything at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend

from minisgl.text import Tokenizer, load_text
from minisgl.text.detokenizer import make_detokenizer

KINDS = ["smollm2", "byte_level", "byte_fallback", "byte_fallback_unstripped", "metaspace_decoder", "no_decoder"]
text_settings = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text(alphabet="abe th\n.0éß東京🙂👩\u200d\u0301\ufffd<s>", max_size=30)


def with_decoder(backend: Backend, decoder: decoders.Decoder | None) -> Backend:
    copy = Backend.from_str(json.dumps(json.loads(backend.to_str()) | {"decoder": None}))
    if decoder is not None:
        copy.decoder = decoder
    return copy


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request) -> Tokenizer:
    if request.param == "smollm2":
        return load_text(request.getfixturevalue("smollm2_path")).tokenizer
    if request.param == "byte_level":
        backend = Backend.from_str(request.getfixturevalue("byte_level").to_str())
        backend.add_tokens([AddedToken("naïve 東", normalized=False), AddedToken("ü", normalized=False)])
        return Tokenizer(backend, {})
    backend = request.getfixturevalue("metaspace")
    unstripped = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    decoder = {
        "byte_fallback": backend.decoder,
        "byte_fallback_unstripped": unstripped,
        "metaspace_decoder": decoders.Metaspace(),
        "no_decoder": None,
    }[request.param]
    return Tokenizer(with_decoder(backend, decoder), {})


def pieces(ids: list[int], cuts: list[int]) -> Iterator[list[int]]:
    """`ids` cut into pieces of the given lengths, the rest one by one."""
    at = 0
    for length in [*cuts, *[1] * len(ids)]:
        if at < len(ids):
            yield ids[at : at + length]
            at += length


def interesting_ids(tokenizer: Tokenizer, data: st.DataObject) -> list[int]:
    """Random ids with many special, byte, multi-byte and unknown ones, or the ids of a text."""
    if data.draw(st.booleans()):
        return tokenizer.encode(data.draw(WORDS))
    size = tokenizer.vocab_size
    some = st.one_of(st.integers(0, 270), st.integers(size - 40, size + 3), st.integers(0, size - 1))
    return data.draw(st.lists(some, max_size=30))


@text_settings(max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_what_is_emitted_equals_the_whole_decode(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = interesting_ids(tokenizer, data)
    detokenizer = make_detokenizer(tokenizer, (), skip)
    emitted = "".join(detokenizer.push(piece) for piece in pieces(ids, data.draw(st.lists(st.integers(0, 5)))))
    assert emitted + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
    assert detokenizer.flush() == ""


@text_settings(max_examples=200)
@given(data=st.data(), text=WORDS, skip=st.booleans())
def test_text_after_a_prompt_continues_it(tokenizer: Tokenizer, data: st.DataObject, text: str, skip: bool) -> None:
    prompt, ids = tokenizer.encode(text), interesting_ids(tokenizer, data)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    assume(whole.startswith(before))  # not where a bad byte spoils the prompt's last run of byte tokens
    detokenizer = make_detokenizer(tokenizer, prompt, skip)
    emitted = "".join(detokenizer.push([i]) for i in ids)
    assert before + emitted + detokenizer.flush() == whole


@text_settings(max_examples=200)
@given(data=st.data(), text=WORDS)
def test_nothing_emitted_is_ever_taken_back_or_half(tokenizer: Tokenizer, data: st.DataObject, text: str) -> None:
    assume("\ufffd" not in text)
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    detokenizer, emitted = make_detokenizer(tokenizer), ""
    for piece in pieces(ids, data.draw(st.lists(st.integers(0, 5)))):
        emitted += detokenizer.push(piece)
        assert "\ufffd" not in emitted
        assert whole.startswith(emitted)
    assert emitted + detokenizer.flush() == whole


@text_settings(max_examples=100)
@given(text=WORDS)
def test_byte_level_text_comes_as_soon_as_its_characters_are_whole(byte_level, text: str) -> None:
    tokenizer = Tokenizer(byte_level, {})
    detokenizer, emitted, data = make_detokenizer(tokenizer), "", b""
    for i in tokenizer.encode(text, add_special_tokens=False):
        emitted += detokenizer.push([i])
        data += b"" if i in tokenizer.special_ids else tokenizer.token_bytes(i)
        assert emitted == data.decode(errors="ignore")


def test_byte_fallback_characters_wait_for_the_end_of_their_run(metaspace) -> None:
    tokenizer = Tokenizer(metaspace, {})
    detokenizer = make_detokenizer(tokenizer)
    ids = tokenizer.encode("a🙂é b", add_special_tokens=False)
    assert sum(tokenizer.backend.id_to_token(i).startswith("<0x") for i in ids) == 6
    assert [new for i in ids if (new := detokenizer.push([i]))] == ["a", "🙂é ", "b"]


def test_byte_level_bad_bytes_are_replaced_and_do_not_stall(byte_level) -> None:
    tokenizer = Tokenizer(byte_level, {})
    lead, letter = (next(i for i in range(300) if tokenizer.token_bytes(i) == b) for b in (b"\xf0", b"a"))
    detokenizer = make_detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in (lead, letter, lead, lead)] == ["", "\ufffda", "", "\ufffd"]
    assert detokenizer.flush() == "\ufffd"


def test_a_space_after_the_prompt_is_kept(metaspace) -> None:
    tokenizer = Tokenizer(metaspace, {})
    prompt, ids = tokenizer.encode("The quick"), tokenizer.encode("brown", add_special_tokens=False)
    assert make_detokenizer(tokenizer, prompt).push(ids) == " brown"
    assert make_detokenizer(tokenizer, [1]).push(ids) == "brown"
    assert make_detokenizer(tokenizer, [*prompt, 2, 1, 3]).push(ids) == " brown"


class CountingTokenizer(Tokenizer):
    """Counts the tokens that `decode` is given."""

    num_decoded = 0

    def decode(self, ids, skip_special_tokens=True):
        self.num_decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("text", ["the fox " * 300, "🙂" * 500, "<s>" * 500 + "x", "a🙂" * 200])
def test_the_cost_per_token_does_not_grow_with_the_text(metaspace, text: str) -> None:
    tokenizer = CountingTokenizer(metaspace, {})
    ids = tokenizer.encode(text)
    detokenizer = make_detokenizer(tokenizer)
    emitted = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert emitted == super(CountingTokenizer, tokenizer).decode(ids)
    assert tokenizer.num_decoded <= 6 * len(ids)


@text_settings(max_examples=100)
@given(data=st.data())
def test_byte_level_end_of_a_run_of_bad_bytes_is_as_decoded(byte_level, data: st.DataObject) -> None:
    tokenizer = Tokenizer(byte_level, {})
    of_byte = {tokenizer.token_bytes(i): i for i in range(4, 260)}
    raw = data.draw(st.binary(max_size=12))
    ids = [of_byte[bytes([b])] for b in raw]
    detokenizer = make_detokenizer(tokenizer)
    emitted = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert emitted == tokenizer.decode(ids) == raw.decode(errors="replace")


@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_prompt_may_end_inside_a_character(byte_level, skip: bool) -> None:
    tokenizer = Tokenizer(byte_level, {})
    of_byte = {tokenizer.token_bytes(i): i for i in range(4, 260)}
    *begun, last = [of_byte[bytes([b])] for b in "x🙂".encode()]
    assert make_detokenizer(tokenizer, begun, skip).push([last]) == "🙂"
    after_special = make_detokenizer(tokenizer, [*begun, *[2] * 9], skip)  # tokens that aren't text don't end it
    assert after_special.push([last]) == ("🙂" if skip else "\ufffd")
