"""Launch configurations: the shipped table, tables of users, the fallback; and plans remembered by layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.cli import profile
from minisgl.kernels import tuning
from minisgl.kernels.skinny_gemm.op import product_name
from minisgl.kernels.spec import by_layout, registry
from minisgl.kernels.tuning import Config, analytic, bucket, from_table, read_table, table_paths
from minisgl.profiling.products import entries
from minisgl.profiling.tune import best_config, with_products, write_table
from minisgl.types import KernelError

SHIPPED = Path(tuning.__file__).with_name("sm_90.json")


def test_shipped_table_covers_every_tunable_kernel() -> None:
    table = read_table(SHIPPED)
    for spec in registry().values():
        for shape in spec.tunable:
            rows = table[spec.name]
            threads, work = rows[bucket(spec.cost(shape, torch.bfloat16)[0])]
            assert Config(threads, work) in spec.configs
    assert "H100" in json.loads(SHIPPED.read_text())["gpu"]


def test_from_table_takes_the_nearest_bucket() -> None:
    table = {"index": {14: (64, 1), 20: (128, 2)}}
    assert from_table(table, "index", 1) == Config(64, 1)
    assert from_table(table, "index", 1 << 16) == Config(64, 1)
    assert from_table(table, "index", 1 << 18) == Config(128, 2)
    assert from_table(table, "index", 1 << 40) == Config(128, 2)
    assert from_table(table, "store", 1) is None


def test_bucket_rounds_up_to_a_power_of_two() -> None:
    assert [bucket(n) for n in (1024, 1025, 2048, 2049)] == [10, 11, 11, 12]
    assert bucket(0) == bucket(1) == 1


@pytest.mark.parametrize("num_sms", [16, 132])
def test_analytic_gives_small_calls_many_warps_and_large_calls_work(num_sms: int) -> None:
    works = [analytic(1 << n, num_sms).work for n in range(10, 34)]
    assert works[0] == 1 and works[-1] == 4 and works == sorted(works)
    for n in range(10, 34):
        config = analytic(1 << n, num_sms)
        assert config.work == 1 or (1 << n) / (1024 * config.work) >= 8 * num_sms  # warps


def test_choose_prefers_the_users_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor, multi_processor_count = 9, 0, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path))
    tuning._table.cache_clear()
    shipped = from_table(read_table(SHIPPED), "store", 1 << 20)
    assert tuning.choose("store", 0, 1 << 20) == shipped
    assert tuning.choose("unknown", 0, 1 << 20) == analytic(1 << 20, 132)
    own = table_paths("sm_90")[0]
    own.parent.mkdir(parents=True)
    own.write_text('{"kernels": {"store": {"20": [32, 7]}}}')
    tuning._table.cache_clear()
    assert tuning.choose("store", 0, 1 << 20) == Config(32, 7)
    tuning._table.cache_clear()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": {"index": {"x": [1, 2]}}}', '{"kernels": {"index": 3}}'])
def test_damaged_table_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "sm_90.json").write_text(text)
    with pytest.raises(KernelError, match=r"sm_90\.json is no tuning table"):
        read_table(tmp_path / "sm_90.json")


def test_best_config_takes_the_largest_blocks_within_the_noise() -> None:
    small, large, wide, slow = Config(64, 1), Config(256, 1), Config(256, 2), Config(512, 1)
    assert best_config([(small, 1.0), (large, 1.005), (wide, 1.0), (slow, 1.02)]) == large
    assert best_config([(small, 1.0), (slow, 1.02)]) == small


def test_written_table_reads_back(tmp_path: Path) -> None:
    table = {
        "arch": "sm_70",
        "gpu": "a GPU",
        "torch": "2.9",
        "kernels": {"index": {"14": [64, 1]}, "store": {"20": [128, 2]}},
    }
    path = write_table(table, tmp_path / "new" / "sm_70.json")
    assert read_table(path) == {"index": {14: (64, 1)}, "store": {20: (128, 2)}}
    assert json.loads(path.read_text()) == table


def test_table_goes_to_the_users_cache_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path))
    table = {"arch": "sm_70", "gpu": "a GPU", "torch": "2.9", "kernels": {}}
    assert write_table(table) == table_paths("sm_70")[0] == tmp_path / "tuning" / "sm_70.json"


def _measured(tokens: int, engine: float, ours: float, scatter: float = 0.01) -> dict[str, Any]:
    def variant(name: str, us: float, config: list[int] | None = None) -> dict[str, Any]:
        times = {"median": us, "p10": us - scatter, "p90": us + scatter}
        return {"variant": name, "us": times, "version": "v3" if config else None, "config": config}

    variants = [variant("cublas", 0.5), variant("engine", engine), variant("v3", ours, [128, 2]), variant("v1", 0.1)]
    return {"n": 64, "k": 32, "tokens": tokens, "norm": 1, "gated": 0, "add": 0, "variants": variants}


def test_products_enter_the_table_where_ours_was_faster_than_the_scatter() -> None:
    rows = [_measured(1, 3.0, 2.0), _measured(8, 2.0, 3.0), _measured(16, 2.015, 2.0), _measured(5, 3.0, 2.0)]
    assert entries(rows) == {"skinny_gemm 64x32 norm": {"1": [128, 2]}}


def test_products_measured_again_replace_what_the_table_had() -> None:
    name = "skinny_gemm 64x32 norm"
    table = {
        "kernels": {"store": {"20": [64, 1]}, name: {"1": [256, 1], "32": [256, 4]}, "skinny_gemm 9x9": {"1": [1, 1]}}
    }
    merged = with_products(table, [_measured(1, 2.0, 3.0), _measured(8, 3.0, 2.0)])["kernels"]
    assert merged == table["kernels"] | {name: {"8": [128, 2], "32": [256, 4]}}


def test_shipped_products_are_ones_that_the_kernel_takes() -> None:
    names = [name for name in read_table(SHIPPED) if name.startswith("skinny_gemm ")]
    assert names
    for name in names:
        sizes, *fused = name.split()[1:]
        n, k = map(int, sizes.split("x"))
        assert product_name(n, k, "norm" in fused, "silu" in fused, "add" in fused) == name
        assert n % 32 == k % 32 == 0
        assert all(Config(*found) in registry()["skinny_gemm"].configs for found in read_table(SHIPPED)[name].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_profile_tune_says_that_it_needs_a_gpu() -> None:
    parser = argparse.ArgumentParser()
    profile.add_options(parser)
    with pytest.raises(KernelError, match="tuning needs an NVIDIA GPU"):
        profile.run(parser.parse_args(["tune"]))


def test_by_layout_plans_once_for_tensors_that_look_the_same() -> None:
    planned = []

    @by_layout
    def plan(tensors: tuple[torch.Tensor | None, ...], option: int) -> object:
        planned.append(option)
        return lambda: option

    x, y = torch.zeros(4, 6), torch.ones(4, 6)
    assert plan((x, None), 1) is plan((y, None), 1)
    assert len(planned) == 1
    different = [(x.T, None), (x[:, :3], None), (x.double(), None), (x, y), (x.view(24)[1:21].view(4, 5), None)]
    for tensors in different:
        plan(tensors, 1)
    assert len(planned) == 1 + len(different)
    assert plan((x, None), 2)() == 2


def test_by_layout_does_not_remember_failures() -> None:
    calls = []

    @by_layout
    def plan(tensors: tuple[torch.Tensor, ...]) -> object:
        calls.append(1)
        raise KernelError("no")

    for _ in range(2):
        with pytest.raises(KernelError):
            plan((torch.zeros(1),))
    assert len(calls) == 2
