"""Tokenizers from folders and from the default model, against transformers' own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from minisgl.gguf_file import read_gguf
from minisgl.text import Tokenizer as OurTokenizer
from minisgl.text import load_text
from minisgl.types import ModelError, RequestError

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces before, two after  ",
    "tabs\tand\r\nnew\n\n\nlines   \n ",
    "It's we'll I'VE don't 'tis",
    "1 12 123 1234567 3.14 ½ ² ٣ 1st",
    "naïve café Größe ELLÁDA Ελλάδα Москва",
    "e\u0301 n\u0303 \u1e9b\u0323 क्षि",
    "東京都で、こんにちは。안녕하세요 你好",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 ❤️ 𝔘𝔫𝔦",
    "for (int i = 0; i < n; ++i) {\n    x[i] <<= 2;  // ok\n}",
    "nul\x00 bell\x07 bom\ufeff nbsp\u00a0 zwj\u200d \ufffd \U0010ffff",
    "<s>special</s> <|user|> <|im_start|>user\nhi<|im_end|> <think>",
    "a" * 500 + " " * 70 + "." * 300,
]
CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    "unk_token": "<unk>",
}
HF_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_folder_tokenizer_agrees_with_transformers(kind, save, request) -> None:
    folder = save(request.getfixturevalue(kind), tokenizer_config=CONFIG | HF_CLASS)
    ours, theirs = load_text(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.encode("Hi")[0] == ours.bos_token_id
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


def test_smollm2_agrees_with_transformers(smollm2_path: Path) -> None:
    ours = load_text(smollm2_path).tokenizer
    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # transformers takes GPT-2's rule for this file; the model's own tokenizer.json splits digits off first
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert ours.vocab_size == len(theirs) == 49152
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special} == set(range(17))
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    for text in [*TEXTS, "a  1   22", "x=\n\n  7;"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_smollm2_prompts_are_the_expected_ones(smollm2_path: Path) -> None:
    expected = json.loads((Path(__file__).parents[1] / "expected" / "smollm2.json").read_text("utf-8"))
    text = load_text(smollm2_path)
    for case in expected["cases"]:
        prompt = text.chat_template.render(case["messages"])
        assert prompt == case["prompt"]
        assert text.tokenizer.encode(prompt, add_special_tokens=False) == case["prompt_token_ids"]
        assert text.tokenizer.decode(case["output_token_ids"]) == case["output_text"]


def test_smollm2_is_built_in_well_under_a_second(smollm2_path: Path) -> None:
    metadata = read_gguf(smollm2_path).metadata
    start = time.process_time()
    OurTokenizer.from_gguf(metadata)
    assert time.process_time() - start < 1


def test_token_bytes_of_a_text_join_to_the_text(byte_level, metaspace, save) -> None:
    for backend in (byte_level, metaspace):
        tokenizer = OurTokenizer(backend, {})
        text = "Größe 東京 🙂\n x"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == text
        assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize("text", ["half \ud83d of a pair", "\udc00"])
def test_encode_refuses_half_of_a_surrogate_pair(text: str, byte_level) -> None:
    tokenizer = OurTokenizer(byte_level, {})
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode(text)
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_batch(["fine", text])


def test_encode_refuses_what_is_no_text(byte_level) -> None:
    with pytest.raises(RequestError, match="expected text, got int"):
        OurTokenizer(byte_level, {}).encode(5)


def test_decode_leaves_out_ids_beyond_the_vocabulary(byte_level) -> None:
    tokenizer = OurTokenizer(byte_level, {})
    ids = tokenizer.encode("abc")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "abc"


def test_folder_truncation_and_padding_of_training_are_dropped(byte_level, save) -> None:
    backend = Tokenizer.from_str(byte_level.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = load_text(save(backend)).tokenizer
    assert tokenizer.decode(tokenizer.encode("a long text " * 9)) == "a long text " * 9
    assert len(tokenizer.encode("a")) == 2


def test_folder_tokens_listed_only_in_tokenizer_config_are_added(byte_level, save) -> None:
    size = byte_level.get_vocab_size()
    entry = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {str(size): {"content": "<|tool|>", "special": True} | entry}
    added[str(size + 1)] = {"content": "<note>", "special": False} | entry
    folder = save(byte_level, tokenizer_config=CONFIG | HF_CLASS | {"added_tokens_decoder": added})
    ours, theirs = load_text(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("x<|tool|>y<note>")
    assert ids == theirs.encode("x<|tool|>y<note>")
    assert ids[-1] == size + 1
    assert ours.decode(ids) == "xy<note>"


def test_folder_tokenizer_config_goes_before_the_flags_of_added_tokens(byte_level, save) -> None:
    entry = {"content": "<think>", "lstrip": False, "normalized": False, "single_word": False, "special": True}
    think = byte_level.token_to_id("<think>")
    as_listed = {"added_tokens_decoder": {str(think): entry | {"rstrip": True}}}
    as_named = {"pad_token": "<think>"}
    for config, expected in ((as_listed, "xy"), (as_named, "x y")):
        folder = save(byte_level, tokenizer_config=CONFIG | HF_CLASS | config)
        ours, theirs = load_text(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
        ids = ours.encode("x<think> y")
        assert ids == theirs.encode("x<think> y")
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == expected
        assert think in ours.special_ids


def test_folder_special_tokens_map_alone_names_the_tokens(byte_level, save) -> None:
    text = load_text(save(byte_level, special_tokens_map={"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    assert text.tokenizer.special_tokens == {"eos_token": "</s>", "bos_token": "<s>"}
    assert text.generation.eos_token_ids == (2,)


def test_folder_add_bos_token_counts_where_no_post_processor_says_otherwise(byte_level, save) -> None:
    plain = Tokenizer(byte_level.model)
    plain.pre_tokenizer = byte_level.pre_tokenizer
    plain.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    flags = {"add_bos_token": True, "add_eos_token": True}
    tokenizer = load_text(save(plain, tokenizer_config=CONFIG | flags)).tokenizer
    ids = tokenizer.encode("a")
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert tokenizer.encode("a", add_special_tokens=False) == ids[1:-1]


def test_folder_without_tokenizer_files_has_no_tokenizer(save) -> None:
    text = load_text(save(None, config={"eos_token_id": 7}))
    assert (text.tokenizer, text.chat_template) == (None, None)
    assert text.generation.eos_token_ids == (7,)
    with pytest.raises(RequestError, match="send token ids"):
        text.require_tokenizer()
    with pytest.raises(RequestError, match=r"chat_template\.jinja"):
        text.require_chat_template()


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_folder_with_another_tokenizer_form_says_how_to_convert_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ModelError, match="save_pretrained"):
        load_text(tmp_path)


def test_unreadable_files_are_model_errors(tmp_path: Path, byte_level, save) -> None:
    with pytest.raises(ModelError, match="no model at"):
        load_text(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is no tokenizer"):
        load_text(tmp_path)
    save(byte_level)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="no readable JSON"):
        load_text(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected an object"):
        load_text(tmp_path)


def test_folder_word_level_tokenizer_without_decoder_works(save) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = load_text(save(backend)).tokenizer
    assert tokenizer.decode(tokenizer.encode("a b a")) == "a b a"
