"""Building a tokenizer from the vocabulary inside a GGUF file.

GGUF keeps tokens, merges or scores, and the *name* of the rule that cuts text into words before merging
(`tokenizer.ggml.pre`). The rules themselves come with the models' own tokenizers and are listed in
pre_tokenizers.toml.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minisgl.types import ModelError

logger = logging.getLogger(__name__)

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_RULES = tomllib.loads(Path(__file__).with_name("pre_tokenizers.toml").read_text(encoding="utf-8"))
PRE_TOKENIZERS = {name: tuple(family["rules"]) for family in _RULES["families"] for name in family["names"].split()}
_WHOLE_WORDS, _NFC = frozenset(_RULES["whole_words"].split()), frozenset(_RULES["nfc"].split())


def build(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that `metadata` describes; None if the file carries none.

    Raises:
        ModelError: a kind of vocabulary or a pre-tokenizer unknown here, or a vocabulary that doesn't fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ModelError(
            f"this GGUF file has a tokenizer of kind {kind!r}; expected {' or '.join(builders)}. "
            "Use the model's safetensors folder with its tokenizer.json instead"
        )
    try:
        tokenizer = builders[kind](metadata)
    except KeyError as e:
        raise ModelError(f"this GGUF file has no {e.args[0]}, which its tokenizer needs; convert it anew") from e
    except Exception as e:  # tokenizers raises bare Exception, for a merge of unknown tokens say
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"the tokenizer in this GGUF file doesn't fit together: {e}") from e
    _add_special_tokens(tokenizer, metadata)
    _add_bos_eos(tokenizer, metadata)
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token … as far as the file names them."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        logger.warning("the GGUF file doesn't name its pre-tokenizer; using the default one, which may split wrongly")
        pre = "default"
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"this GGUF file wants the pre-tokenizer {pre!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Use the model's safetensors folder with its tokenizer.json instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre in _WHOLE_WORDS)
    tokenizer = Tokenizer(bpe)
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in PRE_TOKENIZERS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: spaces are '▁', unknown characters become byte tokens, a text starts with a space."""
    tokens = metadata["tokenizer.ggml.tokens"]
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        merges = merges_from_scores(tokens, metadata["tokenizer.ggml.scores"], types)
    unknown = special_tokens(metadata).get("unk_token")
    vocab = _vocabulary(metadata)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Merges in the order SentencePiece would apply them: it joins the pair whose result scores highest."""
    known = set(tokens)
    ranked = sorted((i for i, kind in enumerate(types) if kind == _NORMAL), key=lambda i: -scores[i])
    merges = []
    for token in (tokens[i] for i in ranked):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                merges.append((left, right))
    return merges


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Tokens that match in the text as a whole; control tokens also vanish from decoded text."""
    kinds = list(zip(metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type") or (), strict=False))
    special = [AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind in (_UNKNOWN, _CONTROL)]
    plain = [AddedToken(t, normalized=False, special=False) for t, kind in kinds if kind == _USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_bos_eos(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    names = special_tokens(metadata)
    spm = metadata["tokenizer.ggml.model"] == "llama"
    bos_is_usual = spm or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    bos = names.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", bos_is_usual) else None
    eos = names.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    set_bos_eos(tokenizer, bos, eos)


def set_bos_eos(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `tokenizer` put these tokens around a text that is encoded with special tokens."""
    around = [t for t in (bos, eos) if t is not None]
    if not around:
        return
    template = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=[*template, "$B:1"], special_tokens=[(t, tokenizer.token_to_id(t)) for t in set(around)]
    )
