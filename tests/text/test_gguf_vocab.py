"""Tokenizers from GGUF metadata: against transformers' loading of the same file, and against plain definitions."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from minisgl.text import Tokenizer, load_text
from minisgl.text.gguf_vocab import PRE_TOKENIZERS, merges_from_scores
from minisgl.types import ModelError

TEXTS = [
    "Hello, world! It's 12345 o'clock, ISN'T it?  HTTPServer getURL naïveÜber",
    "  leading   runs \t\t of\r\n\r\n  space   ",
    "x=1;y=22;z=333 4444 ½ 東京都2024年 안녕 Ελλάδα МОСКВА",
    "🙂👩‍👩‍👧‍👦 <<a>> $5+^~|` «q» ...!?\n/// \n",
]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def byte_level_metadata(backend: Backend, pre: str | None) -> dict[str, Any]:
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    types = [USER if t == "<think>" else CONTROL if i < 4 else NORMAL for i, t in enumerate(tokens)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | ({} if pre is None else {"tokenizer.ggml.pre": pre})


def sentencepiece_metadata(backend: Backend) -> dict[str, Any]:
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    types = [UNKNOWN, CONTROL, CONTROL, CONTROL] + [BYTE] * 256
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": types + [NORMAL] * (len(tokens) - len(types)),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file of a Llama without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "smaug-bpe"])
def test_byte_level_pre_tokenizer_agrees_with_transformers(pre: str, byte_level, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_metadata(byte_level, pre))
    ours = load_text(path).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).backend_tokenizer
    for text in TEXTS:
        composed = normalize("NFC", text)
        cut = ours.backend.pre_tokenizer.pre_tokenize_str(composed)
        assert cut == theirs.pre_tokenizer.pre_tokenize_str(composed), text
        assert ours.decode(ours.encode(text)) == composed


def test_byte_level_pre_tokenizer_splits_digits_for_smollm(byte_level) -> None:
    ours = Tokenizer.from_gguf(byte_level_metadata(byte_level, "smollm")).backend.pre_tokenizer
    model = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for text in TEXTS:
        assert ours.pre_tokenize_str(text) == model.pre_tokenize_str(text)


def test_byte_level_default_pre_tokenizer_cuts_punctuation_and_digit_triples(byte_level) -> None:
    ours = Tokenizer.from_gguf(byte_level_metadata(byte_level, "default")).backend.pre_tokenizer
    cut = [piece for piece, _ in ours.pre_tokenize_str("Hi, you! 12345 a+b")]
    assert cut == ["Hi", ",", "Ġyou", "!", "Ġ", "123", "45", "Ġa", "+", "b"]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_every_pre_tokenizer_loses_nothing(pre: str, byte_level) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(byte_level, pre))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_level_whole_words_go_before_merges_for_llama3(byte_level) -> None:
    metadata = byte_level_metadata(byte_level, "llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "qzqz"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
    new = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert Tokenizer.from_gguf(metadata).encode("qzqz") == [1, new]
    assert new not in Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "qwen2"}).encode("qzqz")


def test_byte_level_token_types_tell_special_tokens_from_added_text(byte_level) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(byte_level, "qwen2"))
    ids = tokenizer.encode("a<think>b</s>c")
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "a<think>bc"
    assert tokenizer.special_ids == {0, 1, 2, 3}


def test_bos_and_eos_follow_the_file_and_else_the_kind(byte_level, metaspace) -> None:
    def ends(metadata: dict[str, Any], **flags: bool) -> tuple[bool, bool]:
        more = {f"tokenizer.ggml.add_{name}_token": value for name, value in flags.items()}
        ids = Tokenizer.from_gguf(metadata | more).encode("a")
        return ids[0] == 1, ids[-1] == 2

    assert ends(byte_level_metadata(byte_level, "qwen2")) == (False, False)
    assert ends(byte_level_metadata(byte_level, "qwen2"), bos=True, eos=True) == (True, True)
    assert ends(byte_level_metadata(byte_level, "llama-bpe")) == (True, False)
    assert ends(byte_level_metadata(byte_level, "llama-bpe"), bos=False) == (False, False)
    assert ends(sentencepiece_metadata(metaspace)) == (True, False)
    assert ends(sentencepiece_metadata(metaspace), bos=False, eos=True) == (False, True)


def test_sentencepiece_agrees_with_transformers(metaspace, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", sentencepiece_metadata(metaspace))
    ours, theirs = load_text(path).tokenizer, AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (t.strip() for t in TEXTS):  # transformers adds no space before a space; SentencePiece does
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


def spm_encode(text: str, vocab: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece's definition: join the neighbours whose union scores highest, the leftmost first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores[vocab[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in vocab]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [i for p in parts for i in ([vocab[p]] if p in vocab else [vocab[f"<0x{b:02X}>"] for b in p.encode()])]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(text=st.text(alphabet="fibn retuaéß京🙂 \n0x<>", min_size=1, max_size=40))
def test_sentencepiece_merges_are_those_of_the_definition(metaspace, text: str) -> None:
    metadata = sentencepiece_metadata(metaspace)
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    expected = spm_encode(text, vocab, metadata["tokenizer.ggml.scores"])
    assert Tokenizer.from_gguf(metadata).encode(text, add_special_tokens=False) == expected


def test_sentencepiece_merges_leave_out_what_is_no_normal_token() -> None:
    merges = merges_from_scores(["a", "b", "ab", "ba", "aba"], [0, 0, -1, -2, -3], [1, 1, 1, CONTROL, 1])
    assert merges == [("a", "b"), ("ab", "a"), ("a", "ba")]


def test_sentencepiece_space_before_the_text_can_be_off(metaspace) -> None:
    metadata = sentencepiece_metadata(metaspace)
    with_space = Tokenizer.from_gguf(metadata)
    without = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert with_space.token_bytes(with_space.encode("x", add_special_tokens=False)[0]).startswith(b" ")
    assert without.token_bytes(without.encode("x", add_special_tokens=False)[0]) == b"x"
    for text in ("the fox", " the fox", "  x"):
        for tokenizer in (with_space, without):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_file_without_a_pre_tokenizer_name_gets_the_default_and_a_warning(byte_level, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(byte_level, None))
    assert [r.message for r in caplog.records if "pre-tokenizer" in r.message]
    default = Tokenizer.from_gguf(byte_level_metadata(byte_level, "default"))
    assert [tokenizer.encode(t) for t in TEXTS] == [default.encode(t) for t in TEXTS]


def test_what_is_unknown_or_missing_is_a_model_error(byte_level, metaspace) -> None:
    metadata = byte_level_metadata(byte_level, "klingon")
    with pytest.raises(ModelError, match=r"klingon.*known are.*smollm"):
        Tokenizer.from_gguf(metadata)
    with pytest.raises(ModelError, match=r"'bert'.*gpt2 or llama"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.model": "bert"})
    with pytest.raises(ModelError, match=r"no tokenizer\.ggml\.merges"):
        Tokenizer.from_gguf(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a"]}
        )
    broken = byte_level_metadata(byte_level, "qwen2") | {"tokenizer.ggml.merges": ["xyz abc"]}
    with pytest.raises(ModelError, match="doesn't fit together"):
        Tokenizer.from_gguf(broken)
    no_scores = {k: v for k, v in sentencepiece_metadata(metaspace).items() if not k.endswith("scores")}
    with pytest.raises(ModelError, match=r"no tokenizer\.ggml\.scores"):
        Tokenizer.from_gguf(no_scores)


def test_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    text = load_text(write_gguf(tmp_path / "m.gguf", {"llama.block_count": 1}))
    assert text.tokenizer is None and text.chat_template is None


def test_chat_templates_and_sampling_defaults_come_from_the_file(byte_level, tmp_path: Path) -> None:
    more = {
        "tokenizer.chat_template": "{{ bos_token }}plain",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.ggml.eot_token_id": 3,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
    }
    text = load_text(write_gguf(tmp_path / "m.gguf", byte_level_metadata(byte_level, "qwen2") | more))
    assert text.chat_template.render([]) == "<s>plain"
    assert text.chat_template.render([], tools=[{"type": "function"}]) == "tools"
    assert text.generation.eos_token_ids == (2, 3)
    assert text.generation.sampling == {"temperature": 0.5, "top_k": 20}
