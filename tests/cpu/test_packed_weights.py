"""Products with packed weights, and rows of them, against float64."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from minisgl.gguf_file import GGUFTensor
from minisgl.kernels.cpu import GGUF_FORMATS, PackedMatrix, choose_kernels, native
from minisgl.models.build import Place
from minisgl.models.gguf import put as put_gguf
from minisgl.types import ConfigError

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKS = tuple(name.lower() for name in GGUF_FORMATS)
SHAPES = ((960, 576), (33, 64), (1, 32), (130, 2080))
ODD_SHAPES = ((7, 40), (31, 1), (65, 333))  # columns that blocks don't divide
NUM_ROWS = (0, 1, 2, 3, 4, 5, 16, 17, 300)  # of the other factor
pytestmark = pytest.mark.usefixtures("threads")


def quantised(format: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """What a checkpoint holds for `values` in `format`, and the values that it stands for."""
    if format in PLAIN:
        stored = values.to(PLAIN[format])
        return stored, stored.float()
    kind = gguf.GGMLQuantizationType[format.upper()]
    blocks = gguf.quantize(values.numpy(), kind)
    return torch.from_numpy(blocks), torch.from_numpy(gguf.dequantize(blocks, kind))


def packed(format: str, rows: int, columns: int, seed: int = 0) -> tuple[PackedMatrix, Tensor]:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    matrix = PackedMatrix(rows, columns)
    stored, meant = quantised(format, values)
    matrix[:].put(format, stored)
    return matrix, meant


def check(matrix: PackedMatrix, meant: Tensor, m: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, meant.shape[1], generator=generator)
    b = torch.randn(meant.shape[0], generator=generator) if bias else None
    expected = x.double() @ meant.double().T + (0 if b is None else b)
    # what rounding each partial sum adds up to; a single weight left out would be a hundred times that
    bound = 1e-6 * (x.abs().double() @ meant.abs().double().T + (0 if b is None else b.abs()))
    assert ((matrix.linear(x, b).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", (*PLAIN, *BLOCKS))
def test_product_equals_float64(kernels: str, format: str, shape: tuple[int, int]) -> None:
    matrix, meant = packed(format, *shape)
    for m in NUM_ROWS:
        check(matrix, meant, m, bias=bool(m % 2))


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("format", PLAIN)
def test_product_of_odd_columns_equals_float64(kernels: str, format: str, shape: tuple[int, int]) -> None:
    matrix, meant = packed(format, *shape)
    for m in (1, 5, 17):
        check(matrix, meant, m, bias=True)


@pytest.mark.parametrize("format", (*PLAIN, *BLOCKS))
def test_embed_returns_the_rows_exactly(kernels: str, format: str) -> None:
    matrix, meant = packed(format, 101, 96)
    ids = torch.tensor([0, 100, 31, 32, 64, 63, 0, 99], dtype=torch.int32)
    torch.testing.assert_close(matrix.embed(ids), meant[ids.long()], rtol=1e-6, atol=1e-7)
    assert matrix.embed(ids[:0]).shape == (0, 96)


def test_values_of_every_half_are_exact(kernels: str) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    ids = torch.arange(2048, dtype=torch.int32)
    for format, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        values = every.view(dtype).clone()
        values[~values.isfinite()] = 0
        matrix = PackedMatrix(2048, 32)
        matrix[:].put(format, values.view(2048, 32))
        assert torch.equal(matrix.embed(ids), values.view(2048, 32).float())


def test_matrix_is_filled_in_parts_of_any_order_and_format(kernels: str) -> None:
    matrix, meant = PackedMatrix(100, 64), torch.empty(100, 64)
    for seed, (format, rows) in enumerate({"q4_1": slice(70, 100), "bf16": slice(0, 5), "q8_0": slice(5, 70)}.items()):
        generator = torch.Generator().manual_seed(seed)
        stored, meant[rows] = quantised(format, torch.randn(rows.stop - rows.start, 64, generator=generator))
        matrix[rows].put(format, stored)
    check(matrix, meant, 1, bias=True)
    check(matrix, meant, 20, bias=False)
    ids = torch.tensor([4, 5, 69, 70, 99], dtype=torch.int32)
    torch.testing.assert_close(matrix.embed(ids), meant[ids.long()], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copied_values_take_the_narrowest_exact_format(dtype: torch.dtype) -> None:
    values = torch.randn(64, 64).to(dtype)
    matrix = PackedMatrix(64, 64)
    matrix[:].copy_(values.float())
    assert matrix.nbytes == values.nbytes
    assert torch.equal(matrix.embed(torch.arange(64, dtype=torch.int32)), values.float())


def test_input_may_be_a_slice_of_rows() -> None:
    matrix, meant = packed("f32", 40, 64)
    wide = torch.randn(6, 200)
    torch.testing.assert_close(matrix.linear(wide[:, 100:164]), wide[:, 100:164] @ meant.T)
    torch.testing.assert_close(matrix.linear(wide.T[:64].T), wide[:, :64] @ meant.T)


def test_wrong_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="another size"):
        PackedMatrix(4, 64)[:].put("f32", torch.zeros(4, 63))
    with pytest.raises(ValueError, match="multiple of 32"):
        PackedMatrix(4, 40)[:].put("q8_0", torch.zeros(4, 34, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no packed format q9"):
        PackedMatrix(4, 64)[:].put("q9", torch.zeros(4, 64))


def test_kernels_are_chosen_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    best = native.cpu_available_kernels()[0]
    monkeypatch.setenv("MINISGL_CPU_KERNELS", "portable")
    choose_kernels()
    assert native.cpu_kernels() == "portable"
    monkeypatch.setenv("MINISGL_CPU_KERNELS", "mmx")
    with pytest.raises(ConfigError, match=r"mmx.*can run: .*portable"):
        choose_kernels()
    monkeypatch.delenv("MINISGL_CPU_KERNELS")
    choose_kernels()
    assert native.cpu_kernels() == best


def test_threads_give_the_same_result_as_one() -> None:
    matrix, _ = packed("q4_1", 960, 576)
    x, results = torch.randn(20, 576), []
    for count in (1, 2, 5, 1):
        native.cpu_set_threads(count)
        assert native.cpu_threads() == count
        results += [matrix.linear(x) for _ in range(200)]
    assert all(torch.equal(results[0], r) for r in results)


def test_forked_child_has_threads_of_its_own() -> None:
    matrix, _ = packed("q8_0", 960, 576)
    x = torch.randn(20, 576)
    expected = matrix.linear(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(matrix.linear(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_1", "F16"])
@pytest.mark.parametrize("pairs_of", [None, 8])
def test_gguf_tensors_are_packed(tmp_path: Path, kind: str, pairs_of: int | None) -> None:
    values = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    (tmp_path / "weights").write_bytes(bytes(100) + blocks.tobytes())
    tensor = GGUFTensor("w", (48, 64), kind, 100, blocks.nbytes)
    matrix, plain = PackedMatrix(48, 64), torch.empty(48, 64)
    for target in (matrix[:], plain):
        put_gguf(Place(target, (48, 64)), str(tmp_path / "weights"), tensor, pairs_of)
    exact = kind != "Q5_1"  # whose values half precision rounds
    rounding = 1e-6 if exact else 2**-11
    torch.testing.assert_close(matrix.embed(torch.arange(48, dtype=torch.int32)), plain, rtol=rounding, atol=1e-7)
    assert matrix.nbytes == (48 + 16) * 64 * (2 if not exact else blocks.nbytes / values.size), "two panels of 32 rows"
