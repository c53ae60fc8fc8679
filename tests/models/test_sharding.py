"""What a rank holds and reads: numbers of ranks that work, and slices that together are the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import metadata, to_gguf, write
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minisgl.distributed import TPGroup
from minisgl.models import gguf, weights
from minisgl.models.build import model_places
from minisgl.models.config import ModelConfig, MoEConfig
from minisgl.models.decoder import CausalLM
from minisgl.models.registry import load_model, read_config
from minisgl.models.sharding import VocabRange, allowed_tp_sizes, check_tp_size
from minisgl.types import ConfigError

Checkpoint = Callable[[str], tuple[Path, Any]]
CPU = torch.device("cpu")


def load(path: Path, rank: int = 0, size: int = 1, **options: Any) -> CausalLM:
    """One rank's part; loading needs no word with the others."""
    return load_model(path, torch.float32, CPU, TPGroup(rank, size), progress=False, **options)


# -- numbers of ranks -------------------------------------------------------------------------------------------------


def shape(heads: int, kv_heads: int, inner: int, moe: MoEConfig | None = None) -> ModelConfig:
    return ModelConfig("llama", 100, 64, inner, 4, heads, kv_heads, 16, 128, moe=moe)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (shape(9, 3, 1536), [1, 3]),  # SmolLM2 135M: 9 ranks would do for the heads, not for the MLP
        (shape(32, 8, 14336), [1, 2, 4, 8, 16, 32]),
        (shape(14, 2, 4864), [1, 2]),  # Qwen2 0.5B: 7 and 14 don't divide the MLP
        (shape(12, 4, 48), [1, 2, 4, 12]),  # 3 and 6 ranks neither divide 4 heads nor share them evenly
        (shape(8, 8, 48, MoEConfig(4, 2, 12, True)), [1, 2, 4]),  # no layer has the MLP of 48
        (shape(8, 8, 18, MoEConfig(4, 2, 12, True, dense_layers=(0,))), [1, 2]),
        (shape(7, 7, 64), [1]),
    ],
)
def test_allowed_tp_sizes_meet_every_constraint(config: ModelConfig, sizes: list[int]) -> None:
    assert allowed_tp_sizes(config) == sizes
    for size in range(1, 40):
        if size in sizes:
            check_tp_size(config, size)
        else:
            with pytest.raises(ConfigError):
                check_tp_size(config, size)


def test_refusal_gives_every_reason_and_the_sizes_that_work() -> None:
    with pytest.raises(ConfigError) as e:
        check_tp_size(shape(9, 3, 1536), 2)
    assert str(e.value) == (
        "this model can't be split over 2 ranks: 9 attention heads don't divide by 2; 3 key-value heads can be neither "
        "dealt out to 2 ranks nor shared by an equal number of them. --tp can be: 1, 3"
    )


def test_smollm2_on_two_ranks_is_refused_before_anything_is_loaded(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "load", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(CausalLM, "__init__", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ConfigError, match=r"9 attention heads don't divide by 2.* --tp can be: 1, 3$"):
        load(smollm2, 1, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("vocab", [5, 64, 101, 151_936])
def test_vocab_ranges_hold_every_id_once(vocab: int, size: int) -> None:
    ranges = [VocabRange(vocab, TPGroup(rank, size)) for rank in range(size)]
    assert [i for r in ranges for i in range(r.start, r.start + r.size)] == list(range(vocab))
    ids = torch.tensor([0, 1, vocab // 2, vocab - 1])
    for r in ranges:
        assert r.rows == ranges[0].rows >= r.size and (size == 1 or r.start % 4 == 0)
        own = [int(i) - r.start if r.start <= i < r.start + r.rows else r.rows for i in ids]
        assert r.local(ids).tolist() == own


# -- slices -----------------------------------------------------------------------------------------------------------


class Counted:
    """A safetensors slice that counts what is read of it."""

    read: dict[str, int]

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner = name, inner

    def get_shape(self) -> list[int]:
        return self.inner.get_shape()  # type: ignore[no-any-return]

    def __getitem__(self, part: Any) -> Tensor:
        tensor: Tensor = self.inner[part]
        Counted.read[self.name] = Counted.read.get(self.name, 0) + tensor.nbytes
        return tensor


class CountedFile:
    def __init__(self, *args: Any, **options: Any) -> None:
        self.file = safe_open(*args, **options)

    def __enter__(self) -> CountedFile:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        return self.file.keys()  # type: ignore[no-any-return]

    def get_slice(self, name: str) -> Counted:
        return Counted(name, self.file.get_slice(name))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, own_cache: None) -> Iterator[dict[str, int]]:
    """Bytes read of each tensor, from safetensors or GGUF."""
    Counted.read = {}
    monkeypatch.setattr(weights, "safe_open", CountedFile)
    blocks = gguf._blocks

    def counted(path: str, tensor: Any, place: Any) -> Any:
        found = blocks(path, tensor, place)
        Counted.read[tensor.name] = Counted.read.get(tensor.name, 0) + found.data.nbytes
        return found

    monkeypatch.setattr(gguf, "_blocks", counted)
    yield Counted.read


WHOLE = ("mlp.gate.weight", "o_proj.bias", "down_proj.bias", "attn_output.bias", "ffn_down.bias")


def check_shares(read: dict[str, int], path: Path, size: int, kv_heads: int) -> None:
    """Every rank reads its share of a matrix, all of a norm, and whole key-value heads."""
    read.clear()
    load(path)
    whole = dict(read)
    vocab = VocabRange(read_config(path).vocab_size, TPGroup(0, size))
    for rank in range(size):
        read.clear()
        load(path, rank, size)
        for name, num_bytes in whole.items():
            share = 1 / size
            if "norm" in name or name.endswith(WHOLE):
                share = 1
            elif any(part in name for part in ("k_proj", "v_proj", "attn_k", "attn_v")):
                share = max(1, kv_heads // size) / kv_heads
            elif "embd" in name or "embed" in name or name in ("output.weight", "lm_head.weight"):
                share = replace(vocab, tp=TPGroup(rank, size)).size / vocab.vocab_size
            assert read.get(name, 0) == pytest.approx(num_bytes * share), (name, rank)


@pytest.mark.parametrize(
    ("family", "size", "kv_heads"),
    [("llama_bias", 2, 2), ("llama_bias", 4, 2), ("llama_yarn", 8, 1), ("qwen3_moe_mixed", 4, 4)],
)
def test_rank_reads_its_own_slices_of_safetensors(
    checkpoint: Checkpoint, read: dict[str, int], family: str, size: int, kv_heads: int
) -> None:
    check_shares(read, checkpoint(family)[0], size, kv_heads)


@pytest.mark.parametrize(
    ("family", "architecture", "size", "kv_heads", "kind"),
    [("llama_bias", "llama", 2, 2, "F16"), ("llama_yarn", "llama", 4, 1, "F32"), ("llama", "llama", 2, 4, "Q8_0")],
)
def test_rank_reads_its_own_slices_of_gguf(
    checkpoint: Checkpoint,
    read: dict[str, int],
    tmp_path: Path,
    family: str,
    architecture: str,
    size: int,
    kv_heads: int,
    kind: str,
) -> None:
    oracle = checkpoint(family)[1]
    path = tmp_path / "m.gguf"
    write(path, architecture, metadata(oracle, architecture), to_gguf(oracle, architecture), kind)
    check_shares(read, path, size, kv_heads)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("kind", "block"), [("Q8_0", 32), ("Q4_1", 32), ("Q5_0", 32)])
@pytest.mark.parametrize("packed", [False, True])
def test_columns_that_cut_blocks_are_those_of_the_whole(tmp_path: Path, kind: str, block: int, packed: bool) -> None:
    """Slices of 96 columns at 24 and 48: what shares a block with them is read, and left out."""
    from minisgl.gguf_file import read_gguf
    from minisgl.kernels.cpu import PackedMatrix, available
    from minisgl.models.build import Place

    if packed and not available():
        pytest.skip("needs the C++ extension")
    values = np.random.default_rng(0).normal(size=(8, 96)).astype(np.float32)
    write(tmp_path / "m.gguf", "llama", {}, {"token_embd.weight": values}, kind)
    tensor = read_gguf(tmp_path / "m.gguf").tensors["token_embd.weight"]
    whole = torch.from_numpy(gguf.dequantise(str(tmp_path / "m.gguf"), tensor))
    for start, size in ((0, 96), (24, 24), (0, 48), (48, 48), (32, 32)):
        target: Any = PackedMatrix(8, size) if packed else torch.empty(8, size)
        place = Place(target[:], (8, 96), 1, start, size)
        gguf.put(place, str(tmp_path / "m.gguf"), tensor, None)
        got = target.linear(torch.eye(size)).T if packed else target
        exact = not packed or kind != "Q5_0"  # not a packed format: kept in half precision
        torch.testing.assert_close(got, whole[:, start : start + size], rtol=0 if exact else 1e-3, atol=0)
        first, last = start // block, -(-(start + size) // block)
        assert gguf._blocks(str(tmp_path / "m.gguf"), tensor, place).data.nbytes == (
            8 * (last - first) * tensor.num_bytes * block // values.size
        )


@pytest.mark.parametrize("family", ["llama_bias", "llama_yarn", "qwen3_moe_mixed"])
def test_dummy_weights_are_slices_of_one_model(checkpoint: Checkpoint, family: str) -> None:
    folder = checkpoint(family)[0]
    whole = model_places(load(folder, dummy=True, seed=3))
    for rank in range(4):
        for name, place in model_places(load(folder, rank, 4, dummy=True, seed=3)).items():
            everything = whole[name].target
            assert isinstance(place.target, Tensor) and isinstance(everything, Tensor)
            expected = everything[place.slices()][: len(place.target)]  # norms of heads: a row for each of this rank's
            assert torch.equal(place.target, expected), name


MEASURE = """
import re, sys, torch
from pathlib import Path
from minisgl.distributed import TPGroup
from minisgl.models.registry import load_model
torch.ones(64, 64) @ torch.ones(64, 64)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
tp = TPGroup(int(sys.argv[2]) - 1, int(sys.argv[2]))
model = load_model(Path(sys.argv[1]), torch.float32, torch.device("cpu"), tp, progress=False)
print(peak() - before)
"""


def test_host_memory_for_loading_shrinks_with_the_ranks(tmp_path: Path) -> None:
    """A file of 140 MB, mapped 32 MiB at a time; the last rank of four, in a process of its own."""
    config: dict[str, Any] = {"model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 64}
    config |= {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    places = model_places(load(tmp_path, dummy=True))
    save_file({name: torch.ones(place.shape) for name, place in places.items()}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 140e6

    def peak(ranks: int) -> int:
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(ranks)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    one, four = peak(1), peak(4)
    assert one > size
    assert four < size / 4 + 60e6 < 0.6 * one
