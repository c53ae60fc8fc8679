"""Floors, limits, fractions and crossovers: arithmetic, checked by hand."""

from __future__ import annotations

import pytest

from minisgl.profiling import roofline
from minisgl.profiling.roofline import bounds, crossover_bytes, crossover_size, floor, ridge
from minisgl.types import MinisglError

GPU = {"launch_us": 0.8, "launch_pdl_us": 0.5, "hbm_gbps": 3000.0, "l2_gbps": 6000.0, "fp32_tflops": 60.0}


def test_units_agree_with_one_another() -> None:
    assert roofline.memory_us(3e9, 3000.0) == pytest.approx(1000)  # 3 GB at 3 TB/s: a millisecond
    assert roofline.gbps(3e9, 1000) == pytest.approx(3000)
    assert roofline.compute_us(1e12, 1.0) == pytest.approx(1e6)
    assert roofline.tflops(1e12, 1e6) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("num_bytes", "flops", "memory", "limit", "us"),
    [
        (16_384, 0, "HBM", "launch", 0.5),  # the dependent launch, as it is the better one
        (3_000_000, 0, "HBM", "HBM", 1.0),
        (6_000_000, 0, "L2", "L2", 1.0),
        (3_000_000, 120_000_000, "HBM", "compute", 2.0),
    ],
)
def test_floor_is_the_limit_that_asks_for_most(
    num_bytes: int, flops: int, memory: roofline.Memory, limit: str, us: float
) -> None:
    found = floor(num_bytes, flops, GPU, memory)
    assert (found.limit, found.us) == (limit, pytest.approx(us))
    assert found.fraction(2 * us) == pytest.approx(0.5)


def test_floor_of_a_processor_takes_its_own_ceilings() -> None:
    cpu = {"call_us": 0.5, "cpu_gbps": 10.0, "cpu_tflops": 0.1}
    assert bounds(100_000, 1_000_000, cpu, "cpu", "cpu_tflops") == {
        "launch": 0.5,
        "cpu": pytest.approx(10.0),
        "compute": pytest.approx(10.0),
    }


def test_floor_without_ceilings_is_an_error() -> None:
    with pytest.raises(MinisglError, match="no ceiling for HBM and fp32_tflops among none"):
        floor(1, 1, {}, "HBM")


def test_limits_meet_at_the_crossover() -> None:
    at = crossover_bytes(0.5, 3000.0)
    assert at == pytest.approx(1_500_000)
    assert floor(0.99 * at, 0, GPU, "HBM").limit == "launch" and floor(1.01 * at, 0, GPU, "HBM").limit == "HBM"
    intensity = ridge(60.0, 3000.0)
    assert intensity == pytest.approx(20)
    big = 1e9
    assert floor(big, 0.99 * intensity * big, GPU, "HBM").limit == "HBM"
    assert floor(big, 1.01 * intensity * big, GPU, "HBM").limit == "compute"


def test_crossover_size_is_the_first_that_the_launch_doesn_t_bind() -> None:
    assert crossover_size({1: "launch", 64: "launch", 256: "HBM", 1024: "HBM"}) == 256
    assert crossover_size({1: "launch"}) is None
