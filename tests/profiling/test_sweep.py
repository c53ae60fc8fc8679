"""What a sweep chooses to measure, on machines that this one needn't be; and what a machine is called."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minisgl.hardware import CudaDevice, Hardware
from minisgl.kernels.spec import registry
from minisgl.kernels.tuning import Config
from minisgl.profiling import scatter, sweep
from minisgl.profiling.machine import variant
from minisgl.profiling.record import Record, new_record
from minisgl.profiling.replay import cold_copies

GPU = Hardware("a CPU", 8, 1 << 34, CudaDevice("a GPU", (9, 0), 132, 50 << 20, 80 << 30))
CPU = Hardware("a CPU", 8, 1 << 34, None, "no GPU here")
SHAPE = {"tokens": 64, "width": 4096, "vocab": 1000}


@pytest.fixture
def record() -> Record:
    return new_record("index", quick=True)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sweep, "detect", lambda: GPU)
    monkeypatch.setattr("minisgl.profiling.replay.detect", lambda: GPU)
    monkeypatch.setattr(sweep, "choose", lambda *_: Config(128, 2))
    yield


@pytest.mark.usefixtures("on_gpu")
def test_versions_are_all_that_the_gpu_runs_and_the_best_without_dependent_launch(record: Record) -> None:
    spec = registry()["index"]
    found = sweep.versions(spec, SHAPE, torch.float16, record, configs=False)
    assert [v.name for v in found] == ["v2", "v2 no pdl", "v1", "v3", "v3 keep"]
    assert [v.config for v in found][:2] == [None, Config(128, 2, pdl=False)]
    assert record.skipped == []
    assert [v.name for v in sweep.versions(spec, SHAPE, torch.float16, record, False, most=2)] == [
        "v2",
        "v2 no pdl",
        "v1",
    ]


@pytest.mark.usefixtures("on_gpu")
def test_versions_sweep_the_configurations_of_those_that_have_any(record: Record) -> None:
    spec = registry()["index"]
    found = sweep.versions(spec, SHAPE, torch.float16, record, configs=True)
    swept = [v.config for v in found if v.config is not None and v.config.pdl]
    assert tuple(swept) == spec.configs and {v.name for v in found if v.config in swept} == {"v2"}


def test_versions_without_a_gpu_are_noted_with_the_reason(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "detect", lambda: CPU)
    assert sweep.versions(registry()["index"], SHAPE, torch.float16, record, configs=True) == []
    assert {note["why"] for note in record.skipped} == {"needs an NVIDIA GPU: no GPU here"}
    assert len(record.skipped) == len(registry()["index"].versions)


@pytest.mark.usefixtures("on_gpu")
def test_rotation_exceeds_the_cache_and_names_the_memory() -> None:
    spec = registry()["index"]
    copies = sweep.rotation(spec, SHAPE, torch.float16, warm=False)
    num_bytes = spec.cost(SHAPE, torch.float16)[0]
    assert copies == cold_copies(spec, SHAPE, torch.float16)
    assert copies * num_bytes >= 3 * (50 << 20) and sweep.memory_of(copies * num_bytes) == "HBM"
    warm = sweep.rotation(spec, SHAPE, torch.float16, warm=True)
    assert sweep.memory_of(warm * num_bytes) == "L2"


def test_jobs_sweep_configurations_at_one_width_only() -> None:
    for jobs in (scatter.index_jobs("cuda", quick=False), scatter.store_jobs("cuda", quick=False)):
        assert {job.shape["tokens"] for job in jobs} == set(scatter.TOKENS)
        swept = [job for job in jobs if job.configs]
        assert len(swept) == len(scatter.TOKENS)
        assert len({tuple(v for k, v in job.shape.items() if k != "tokens") for job in swept}) == 1


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("NVIDIA H100 80GB HBM3", "SXM"),
        ("NVIDIA H100 PCIe", "PCIe"),
        ("NVIDIA H100 NVL", "NVL"),
        ("NVIDIA A100-SXM4-80GB", "SXM"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_variant_is_what_the_name_tells(name: str, form: str | None) -> None:
    assert variant(name) == form


def test_measure_goes_on_where_a_variant_fails(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "detect", lambda: CPU)
    spec, ceilings = registry()["index"], record.ceilings | {"cpu_gbps": 10.0, "cpu_tflops": 0.1, "launch_us": 1.0}

    def fails(*_: object) -> None:
        raise RuntimeError("no luck")

    variants = [sweep.Variant("bad", fails), sweep.library(spec)]
    rows = sweep.measure(spec, SHAPE, torch.float16, variants, ceilings, samples=1, failed=record.skip)
    assert [row["version"] for row in rows] == ["copy", "torch"]
    assert record.skipped == [{"what": "index bad", "why": "failed: no luck"}]
    with pytest.raises(RuntimeError, match="no luck"):
        list(sweep.measure(spec, SHAPE, torch.float16, variants, ceilings, samples=1))
