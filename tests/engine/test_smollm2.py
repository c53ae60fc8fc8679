"""The default model, through GGUF, against what transformers makes of the same file (`tests/expected`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minisgl import LLM, SamplingParams

EXPECTED = json.loads((Path(__file__).parents[1] / "expected" / "smollm2.json").read_text(encoding="utf-8"))
CASES = EXPECTED["cases"]
PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=48, skip_special_tokens=False)


@pytest.fixture(scope="module", params=[False, True], ids=["lag0", "lag1"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM("smollm2", device="cpu", num_pages=256, max_running=8, overlap=request.param)


def test_smollm2_gives_the_tokens_of_transformers(llm: LLM) -> None:
    results = llm.chat([case["messages"] for case in CASES], PARAMS)
    for case, result in zip(CASES, results, strict=True):
        assert result.prompt_token_ids == case["prompt_token_ids"]
        assert result.token_ids == case["output_token_ids"]


def test_smollm2_gives_the_same_from_the_cache(llm: LLM) -> None:
    result = llm.chat(CASES[0]["messages"], PARAMS)[0]
    assert result.num_cached > 0
    assert result.token_ids == CASES[0]["output_token_ids"]
