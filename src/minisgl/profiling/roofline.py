"""Which limit of the hardware binds a kernel, and how near it comes: arithmetic on measured ceilings, nothing else.

The roofline model (Williams, Waterman and Patterson, 2009), with the launch as a third limit: a kernel takes at least
as long as an empty one, as its bytes take at the bandwidth of the memory they come from, and as its operations take at
the peak rate. The largest of the three is the floor, and the limit that it comes from is the one that binds.

Times are in microseconds, rates in GB/s (1e9 bytes) and TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from minisgl.types import MinisglError

Ceilings = Mapping[str, float]
Limit = Literal["launch", "L2", "HBM", "cpu", "compute"]
Memory = Literal["L2", "HBM", "cpu"]  # cpu: its main memory; from a cache more than all of it can be reached

_BANDWIDTH = {"L2": "l2_gbps", "HBM": "hbm_gbps", "cpu": "cpu_gbps"}
_LAUNCH = ("launch_pdl_us", "launch_us", "call_us")  # the best that there is


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time that the hardware allows, and the limit that asks for it."""

    us: float
    limit: Limit

    def fraction(self, us: float) -> float:
        """How much of the limit a call of `us` microseconds reaches; 1 is all."""
        return self.us / us


def memory_us(num_bytes: float, gbps: float) -> float:
    """Microseconds in which `num_bytes` move at `gbps`."""
    return num_bytes / gbps / 1e3


def compute_us(flops: float, tflops: float) -> float:
    """Microseconds of `flops` operations at `tflops`."""
    return flops / tflops / 1e6


def gbps(num_bytes: float, us: float) -> float:
    """GB/s of `num_bytes` in `us` microseconds."""
    return num_bytes / us / 1e3


def tflops(flops: float, us: float) -> float:
    """TFLOP/s of `flops` operations in `us` microseconds."""
    return flops / us / 1e6


def bounds(
    num_bytes: float, flops: float, ceilings: Ceilings, memory: Memory, rate: str = "fp32_tflops"
) -> dict[Limit, float]:
    """Microseconds that each limit asks for, as far as its ceiling was measured.

    Args:
        num_bytes, flops: what the call must move and compute at least.
        memory: where its data lies. rate: the ceiling that its operations are held to.
    """
    found: dict[Limit, float] = {}
    launch = next((ceilings[name] for name in _LAUNCH if name in ceilings), None)
    if launch is not None:
        found["launch"] = launch
    if _BANDWIDTH[memory] in ceilings:
        found[memory] = memory_us(num_bytes, ceilings[_BANDWIDTH[memory]])
    if rate in ceilings:
        found["compute"] = compute_us(flops, ceilings[rate])
    return found


def floor(num_bytes: float, flops: float, ceilings: Ceilings, memory: Memory, rate: str = "fp32_tflops") -> Floor:
    """The limit that binds; arguments as for `bounds`.

    Raises:
        MinisglError: none of the ceilings was measured.
    """
    limits = bounds(num_bytes, flops, ceilings, memory, rate)
    if not limits:
        raise MinisglError(
            f"no ceiling for {memory} and {rate} among {', '.join(ceilings) or 'none'}; measure them first"
        )
    limit = max(limits, key=limits.__getitem__)
    return Floor(limits[limit], limit)


def crossover_bytes(launch_us: float, gbps: float) -> float:
    """The bytes whose transfer takes as long as a launch: below, the launch binds, above, the bandwidth."""
    return launch_us * gbps * 1e3


def ridge(tflops: float, gbps: float) -> float:
    """The arithmetic intensity, operations a byte, from which on computing binds and not the memory."""
    return tflops * 1e3 / gbps


def crossover_size(sizes: Mapping[int, Limit]) -> int | None:
    """The smallest size whose limit isn't the launch any more, if the limits of `sizes` change at all.

    Args:
        sizes: by size (rows, tokens), the limit that binds there.
    """
    return min((size for size, limit in sizes.items() if limit != "launch"), default=None)
