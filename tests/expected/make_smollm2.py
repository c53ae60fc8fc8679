"""Writes smollm2.json: what transformers makes of the default model, for comparison.

    OMP_NUM_THREADS=2 python tests/expected/make_smollm2.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

transformers reads the same GGUF file with its own code (dequantization, tokenizer, chat template), in fp32 on a CPU,
and decodes greedily. It wants the package accelerate for that. Besides the ids the file keeps, for every step, how
far the chosen logit lay above the next: where this margin is within rounding, another engine may choose otherwise.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

NUM_TOKENS = 48
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    [
        {"role": "system", "content": "You are a pirate. You answer every question like a pirate would."},
        {"role": "user", "content": "How do I boil an egg?"},
    ],
    [
        {"role": "user", "content": "Name three primary colours."},
        {"role": "assistant", "content": "Red, yellow and blue."},
        {"role": "user", "content": "And what do you get when you mix the first two?"},
    ],
    [{"role": "user", "content": "Write a Python function `fib(n)` that returns the n-th Fibonacci number:\n\n\tdef"}],
    [
        {
            "role": "user",
            "content": "Translate to English: «Où est la bibliothèque ? 図書館はどこですか。» 🤔  (42 + 7 = ?)",
        }
    ],
]


@torch.inference_mode()
def continue_greedily(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """NUM_TOKENS greedy tokens, end-of-text ids included as any other, and each one's lead over the second best."""
    ids, margins, cache = torch.tensor([prompt]), [], None
    tokens: list[int] = []
    for _ in range(NUM_TOKENS):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 5))
        ids = best.indices[:1].view(1, 1)
    return tokens, margins


def main(path: Path) -> None:
    options = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
    cases = []
    for chat in CHATS:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        output, margins = continue_greedily(model, prompt)
        print(tokenizer.decode(output), f"(least margin {min(margins)})", sep="\n")
        cases.append(
            {
                "messages": chat,
                "prompt": text,
                "prompt_token_ids": prompt,
                "output_token_ids": output,
                "margins": margins,
                "output_text": tokenizer.decode(output, skip_special_tokens=True),
            }
        )
    versions = {m.__name__: m.__version__ for m in (transformers, torch, tokenizers)}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    result = {"model": path.name, "sha256": digest, "dtype": "float32", "versions": versions, "cases": cases}
    target = Path(__file__).with_name("smollm2.json")
    target.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
