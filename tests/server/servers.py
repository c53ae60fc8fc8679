"""A tiny model with a tokenizer, and real server processes that serve it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTEXT = 4096
VOCAB_SIZE = 259  # 256 bytes and the tokens below
EOS, START, END = "</s>", "<|start|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools, please') }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
A = 32  # the token 'A': a byte-level alphabet in order begins with '!'
START_TIMEOUT_S = 120
KEY = "sk-the-key"


def make_model(folder: Path) -> Path:
    """A one-layer Llama without weights (for --dummy-weights) whose tokens are bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (EOS, START, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Server:
    """A running `python -m minisgl serve`; with `fake`, one whose engine is `FakeEngine`."""

    def __init__(self, *options: str, env: dict[str, str] | None = None, fake: bool = False) -> None:
        program = [str(Path(__file__).with_name("fake_server.py"))] if fake else ["-m", "minisgl"]
        command = [sys.executable, *program, "serve", *options]
        full_env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **(env or {})}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=full_env
        )
        self.output = ""  # stdout and stderr so far
        self.url = ""
        self._ready = threading.Event()
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True)
            for pipe in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            self.output += line
            if found := re.search(r" at (http://\S+)", line):
                self.url = found[1]
                self._ready.set()
        pipe.close()
        self._ready.set()  # or it never will be

    def wait_ready(self) -> Server:
        assert self._ready.wait(START_TIMEOUT_S), self.output
        assert self.url, self.output
        return self

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=30)

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.health().json()["engine"]
        return counts

    def children(self) -> list[int]:
        """Ids of its child processes."""
        return [int(p) for p in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def engine_pid(self) -> int:
        """The child that runs the engine; multiprocessing's resource tracker is another child."""
        [pid] = [p for p in self.children() if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
        return pid

    def exit_code(self, timeout: float = 60) -> int:
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(10)
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.exit_code()


def tiny_options(model: Path, port: int = 0) -> list[str]:
    """What serves `make_model`'s model as 'tiny'; port 0 is any free one."""
    return f"--model {model} --served-model-name tiny --dummy-weights --num-pages 600 --port {port}".split()


@contextmanager
def running(*options: str, env: dict[str, str] | None = None, fake: bool = False) -> Iterator[Server]:
    """A server that was just started, and ends with the context."""
    server = Server(*options, env=env, fake=fake)
    try:
        yield server
    finally:
        server.stop()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, timeout: float = 30.0) -> None:
    """Waits for `condition()` to hold."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
