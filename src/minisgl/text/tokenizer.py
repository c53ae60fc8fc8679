"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders

from minisgl.gguf_file import read_json
from minisgl.text import gguf_vocab
from minisgl.types import ModelError, RequestError

_UNSUPPORTED_FILES = ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "tiktoken.model", "vocab.json")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: printable Latin-1, then U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A vocabulary with its rules.

    Attributes:
        special_tokens: 'bos_token', 'eos_token' … as far as the model names them; chat templates see them.
        special_ids: ids that decoding leaves out when told to skip special tokens.
        byte_level: tokens are bytes, so that text is their concatenation read as UTF-8.
        byte_fallback: some tokens are single bytes (<0xE2>), which make text only together.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self.byte_fallback = backend.decoder is not None and b'"ByteFallback"' in backend.decoder.__getstate__()
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """From tokenizer.json, tokenizer_config.json and special_tokens_map.json; None without any tokenizer file.

        Raises:
            ModelError: an unreadable file, or a tokenizer in another form only.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            other = [name for name in _UNSUPPORTED_FILES if (folder / name).is_file()]
            if other:
                raise ModelError(
                    f"{folder} has its tokenizer as {other[0]} only; minisgl needs a tokenizer.json. Make one with "
                    f'transformers: AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
                )
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises bare Exception
            raise ModelError(f"{file} is no tokenizer that the tokenizers library can read: {e}") from e
        backend.no_truncation()  # a file may carry the settings of its training
        backend.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        special = _named_tokens(read_json(folder / "special_tokens_map.json")) | _named_tokens(config)
        _update_added_tokens(backend, config, special)
        if backend.post_processor is None:
            bos = special.get("bos_token") if config.get("add_bos_token") else None
            eos = special.get("eos_token") if config.get("add_eos_token") else None
            gguf_vocab.set_bos_eos(backend, bos, eos)
        return cls(backend, special)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer | None:
        """From a GGUF file's metadata; None if it carries no vocabulary.

        Raises:
            ModelError: a kind of vocabulary that isn't known here.
        """
        backend = gguf_vocab.build(metadata)
        return None if backend is None else cls(backend, gguf_vocab.special_tokens(metadata))

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included; a model may pad its embedding beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.eos_token)

    def token_id(self, token: str | None) -> int | None:
        """The id of exactly this token; None if there is none."""
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become their ids.

        Args:
            add_special_tokens: put BOS or EOS around it as the model's tokenizer does. Leave them out for text that
                a chat template rendered: it has them already.

        Raises:
            RequestError: `text` has half of a surrogate pair, which is no character.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for each text. Releases the GIL meanwhile, so it may run in a thread beside a busy event loop."""
        for text in texts:
            _check_text(text)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text; none for ids beyond the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._read_bytes(self.backend.id_to_token(token_id) or "")
        return known

    def _read_bytes(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[c] for c in token])
            except KeyError:  # an added token is written as plain text
                return token.encode()
        if self.byte_fallback and is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def is_byte_token(token: str) -> bool:
    """Whether `token` is written <0x00> … <0xFF>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"expected text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(
            f"the text has half of a surrogate pair at character {e.start}, which is no character; send valid Unicode"
        ) from None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Entries like "eos_token": "</s>" or {"content": "</s>", …}."""
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def _update_added_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Adds or changes what tokenizer_config.json says otherwise than tokenizer.json, often an older file."""
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    before = {name: repr(token) for name, token in present.items()}
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    wanted = {e["content"]: AddedToken(**{k: v for k, v in e.items() if k != "__type"}) for _, e in listed}
    for name in special.values():
        wanted.setdefault(name, present.get(name) or AddedToken(name, normalized=False)).special = True
    backend.add_tokens([token for name, token in wanted.items() if repr(token) != before.get(name)])
