"""The ranks' model, their processes as the system sees them, and scripts that use `LLM` in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from servers import VOCAB_SIZE, alive, make_model, wait_until
from tiny import _randomise

from minisgl import LLM, SamplingParams

PAGES = {"device": "cpu", "page_size": 8, "num_pages": 22, "max_batched_tokens": 64, "max_running": 16}
LIMIT_S = 60.0  # for what takes a second or two; a loaded machine is slow


def write_model(folder: Path) -> Path:
    """Two layers of eight heads, four of them key-value heads; random weights, tokens that are bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_model(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config).float().eval()
    _randomise(model, 0)
    model.save_pretrained(folder)
    return folder


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(num_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **more)  # type: ignore[arg-type]


def start(model: Path, size: int, **options: object) -> LLM:
    return LLM(str(model), **(PAGES | {"tp_size": size} | options))


def rank_pids(llm: LLM) -> list[int]:
    """Of ranks 1, 2, …"""
    return [p.pid for p in llm.engine._ranks._processes]  # type: ignore[attr-defined]


def folder(llm: LLM) -> Path:
    """Where the ranks met."""
    path: Path = llm.engine._ranks._folder.path  # type: ignore[attr-defined]
    return path


def children(pid: int) -> list[int]:
    """Processes that `pid` has spawned, multiprocessing's resource tracker left out."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        found = [int(p) for thread in threads for p in (thread / "children").read_text().split()]
        return [p for p in found if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def assert_gone(pids: list[int], *folders: Path) -> None:
    """Every process ends soon, and the folders with them."""
    wait_until(lambda: not any(map(alive, pids)), LIMIT_S)
    wait_until(lambda: not any(path.exists() for path in folders), LIMIT_S)


def script(body: str, model: Path, tmp: Path) -> subprocess.Popen[str]:
    """Runs Python lines, with `LLM`, `SamplingParams` and `options` at hand; its temporary files go below `tmp`."""
    head = "import weakref\nweakref.finalize(weakref.finalize, print, end='')\n"  # the first exit handler
    head += "from minisgl import LLM, SamplingParams\n"
    head += f"options = { ({**PAGES, 'model': str(model), 'tp_size': 2})!r}\n"
    file = tmp / "script.py"
    file.write_text(head + body)
    (tmp / "tmp").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp / "tmp"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
