"""What a model says about its own use: the ids that end a text, and sampling defaults."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisgl.gguf_file import read_json
from minisgl.text.tokenizer import Tokenizer
from minisgl.types import RequestError, SamplingParams

logger = logging.getLogger(__name__)

_RANDOM = ("temperature", "top_k", "top_p", "min_p")  # without effect where nothing is drawn at random
_GGUF_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_GGUF_SAMPLING["penalty_repeat"] = "repetition_penalty"

# Many GGUF files name one end-of-text id only, though the model ends its turns with another of these.
_END_TOKENS = frozenset(("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"))


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Arguments for `SamplingParams.resolve`."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, float | int] = field(default_factory=dict)


def from_folder(folder: Path, tokenizer: Tokenizer | None) -> GenerationDefaults:
    """From generation_config.json, the tokenizer's EOS and, where the former says nothing, config.json.

    Sampling fields apply as they stand, with one exception: a file that says "do_sample": false turns the random
    ones off, and they are left out. The temperature doesn't become 0 by that: a request that names none is sampled
    at 1, as clients of the OpenAI protocol expect.
    """
    file = folder / "generation_config.json"
    config = read_json(file)
    listed = config.get("eos_token_id")
    if listed is None:
        listed = read_json(folder / "config.json").get("eos_token_id")
    ids = _as_ids(listed) + _as_ids(tokenizer.eos_token_id if tokenizer else None)
    names = ("repetition_penalty",) if config.get("do_sample") is False else (*_RANDOM, "repetition_penalty")
    given = {name: config[name] for name in names if config.get(name) is not None}
    return GenerationDefaults(tuple(dict.fromkeys(ids)), _usable(given, str(file)))


def from_gguf(metadata: Mapping[str, Any]) -> GenerationDefaults:
    """From the keys of a GGUF file, and from its control tokens that are known to end a text or a turn."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [i for key in keys for i in _as_ids(metadata.get(f"tokenizer.ggml.{key}"))]
    tokens, types = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    ids += [i for i, kind in enumerate(types) if kind == 3 and tokens[i] in _END_TOKENS]
    prefix = "general.sampling."
    given = {ours: metadata[prefix + key] for key, ours in _GGUF_SAMPLING.items() if prefix + key in metadata}
    return GenerationDefaults(tuple(dict.fromkeys(ids)), _usable(given, "the GGUF file"))


def _as_ids(value: object) -> list[int]:
    values: Iterable[object] = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _usable(given: Mapping[str, Any], source: str) -> dict[str, float | int]:
    """The entries that `SamplingParams` accepts; a bad one is no reason to refuse a model."""
    defaults: dict[str, float | int] = {}
    for name, value in given.items():
        try:
            defaults[name] = getattr(SamplingParams(**{name: value}), name)
        except RequestError as e:
            logger.warning("ignoring a sampling default from %s: %s", source, e)
    return defaults
