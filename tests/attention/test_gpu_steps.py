"""The steps that a GPU runs, put together on a CPU: Triton's attention under its interpreter, the fused layers with the
kernels' references in their place, and decode steps as they are captured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import GREEDY, Driver
from test_fused import calls  # noqa: F401 (a fixture)
from test_graphs import Uncaptured
from test_prompt_graphs import UncapturedPrompts
from tiny import greedy, make_checkpoint

from minisgl.engine.graphs import batch_sizes
from minisgl.models.registry import load_model

pytest.importorskip("triton")

PROMPTS = [[(7 * i + 3 * k) % 60 + 2 for i in range(4 + 9 * k)] for k in range(3)]
STEPS = 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="the routes' tests do this on a GPU")
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_steps_of_a_gpu_give_the_tokens_of_transformers(
    tmp_path: Path,
    calls: dict[str, int],  # noqa: F811
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minisgl.attention.triton_paged import TritonPaged

    monkeypatch.setattr(TritonPaged, "short_context", 16)
    monkeypatch.setattr("minisgl.engine.prompt_graphs.MOST_PROMPTS", 4)
    oracle = make_checkpoint(family, tmp_path)
    driver = Driver(tmp_path, overlap=True, page_size=4, attention="torch_sdpa")
    runner = driver.engine.runner
    runner.model = load_model(tmp_path, torch.float32, torch.device("cpu"), progress=False, fused=True)
    runner.attention = TritonPaged()
    with torch.inference_mode():
        parts = runner.model, runner.pool, runner.attention, runner.rows
        runner.graphs = Uncaptured(*parts, batch_sizes(4), False)
    runner.prompt_graphs = prompts = UncapturedPrompts(*parts, [16], 4, None)
    assert len(runner.graphs.widths) == 2
    expected = [greedy(oracle, prompt, STEPS) for prompt in PROMPTS]
    prompts.replays.clear()
    for steps in (STEPS, 2):
        ids = []
        for prompt in PROMPTS:
            ids.append(driver.add(prompt, replace(GREEDY, max_tokens=steps)))
            driver.step()
        driver.run()
        assert [driver.answers[id].tokens for id in ids] == [tokens[:steps] for tokens in expected]
    assert len(prompts.replays) == 2, "with decodes and without"
    assert calls["qkv_post"] and calls["index"] and calls["silu_mul"]
    driver.close()
