"""Small vocabularies, trained on the spot, in every form that a model may bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minisgl.models.hub import resolve_model

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1984, isn't it? We'll see: 3.14159 + 42 = 45.14159!",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\t# tabs, too\r\n",
    "Größe, café, naïve, Übermut; Ελλάδα, Москва, 東京都, 서울, हिन्दी, العربية",
    "Emoji 🙂 and 👩‍👩‍👧‍👦 and flags 🇫🇷, e\u0301 and n\u0303.",
    "<div class='a'>{{ x }}</div>   spaces     and\n\n\nnewlines",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return resolve_model("smollm2", progress=False)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Byte-level BPE with BOS, special tokens and one added token that is plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    """SentencePiece's BPE as Llama 2 has it: '▁' for spaces, byte fallback, a space before the text."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.train_from_iterator(
        [t for t in CORPUS if t.isascii()], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *learnt["vocab"]]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = learner.normalizer
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a model folder: a tokenizer and JSON files, by name without the suffix."""

    def write(tokenizer: Tokenizer | None, **files: Any) -> Path:
        if tokenizer is not None:
            tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write
