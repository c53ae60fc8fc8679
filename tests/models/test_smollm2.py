"""The default model's own file against transformers' reading of it."""

from __future__ import annotations

from pathlib import Path

import torch
from loop import Loop

from minisgl.models.registry import load_model

PROMPT = [1, 4093, 198, 504, 3575, 282, 4649, 314, 2, 198, 1, 520, 9531, 198]


def test_smollm2_logits_agree_with_transformers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(smollm2, torch.float32, torch.device("cpu"), progress=False)
    ours = Loop(model, page_size=16, num_pages=4).logits(PROMPT)
    oracle = AutoModelForCausalLM.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name, dtype=torch.float32)
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).logits[0]
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
