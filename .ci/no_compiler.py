"""Proves that an install without the C++ extension serves: python no_compiler.py FOLDER, the one it lies in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import minisgl
from minisgl import LLM, SamplingParams
from minisgl.cache.prefix import make_prefix_cache
from minisgl.cache.reference import ReferencePrefixCache


def main() -> None:
    """
    Raises:
        SystemExit: this isn't the install that was meant, or it doesn't do what one with the extension does.
    """
    expected = Path(sys.argv[1]).resolve()
    if not Path(minisgl.__file__).resolve().is_relative_to(expected):
        raise SystemExit(f"imported {minisgl.__file__}, not from {expected}")
    if importlib.util.find_spec("minisgl._C") is not None:
        raise SystemExit("the C++ extension was built after all")
    if not isinstance(make_prefix_cache(16), ReferencePrefixCache):
        raise SystemExit("the prefix cache isn't the plain Python one")

    llm = LLM("smollm2", max_model_len=256)
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    prompt = "The quick brown fox jumps over the lazy dog. " * 4
    first, second = (llm.generate([prompt], greedy)[0] for _ in range(2))
    if not first.token_ids or first.token_ids != second.token_ids:
        raise SystemExit(f"two runs of one prompt differ: {first.token_ids} and {second.token_ids}")
    if second.num_cached == 0:
        raise SystemExit("the second run found nothing in the prefix cache")
    print(f"plain Python install: {first.text!r}, {second.num_cached} prompt tokens from the prefix cache")


if __name__ == "__main__":
    main()
