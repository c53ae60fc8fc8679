"""A kernel's versions and configurations over many sizes: rows for a record, each beside its floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from minisgl.hardware import detect
from minisgl.kernels.spec import KernelSpec, Shape
from minisgl.kernels.tuning import Config, choose
from minisgl.profiling.clock import calls_us, spread
from minisgl.profiling.record import Record
from minisgl.profiling.replay import cold_copies, rotated_inputs
from minisgl.profiling.roofline import Ceilings, Memory, floor, gbps
from minisgl.types import KernelError

WARM_COPIES = 8
CPU_BYTES = 256 << 20  # of data in rotation, at most


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do the same work."""

    name: str
    call: Callable[..., object]
    config: Config | None = None


def library(spec: KernelSpec) -> Variant:
    """torch's own operator."""
    return Variant("torch", spec.library)


def versions(
    spec: KernelSpec, shape: Shape, dtype: torch.dtype, record: Record, configs: bool, most: int | None = None
) -> list[Variant]:
    """The versions that run here (of the first `most`), tuned, and if asked with each of `spec.configs`.

    On a GPU that has dependent launch the preferred version comes without it as well. What can't run is noted in
    `record`.
    """
    hardware, found = detect(), []
    for version in spec.versions[:most]:
        reason = None
        if version.kind != "cpu" and hardware.cuda is None:
            reason = f"needs an NVIDIA GPU: {hardware.no_cuda_reason}"
        else:
            reason = version.supports(hardware.cuda.capability if hardware.cuda else (0, 0), dtype, shape)
        if reason is not None:
            record.skip(f"{spec.name} {version.name}", reason)
            continue
        found.append(_variant(spec, version.name, version.name, None))
        if version.kind == "cuda" and not version.fixed:
            if version is spec.versions[0]:
                tuned = choose(spec.name, 0, spec.cost(shape, dtype)[0])
                found.append(_variant(spec, version.name, "no pdl", Config(tuned.threads, tuned.work, pdl=False)))
            found += [_variant(spec, version.name, "", config) for config in spec.configs if configs]
    return found


def _variant(spec: KernelSpec, version: str, suffix: str, config: Config | None) -> Variant:
    options: dict[str, Any] = {"version": version} if config is None else {"version": version, "config": config}
    name = f"{version} {suffix}" if suffix == "no pdl" else version
    return Variant(name, lambda *args: spec.run(*args, **options), config)


def rotation(spec: KernelSpec, shape: Shape, dtype: torch.dtype, warm: bool) -> int:
    """How many sets of arguments take turns: enough to find nothing in a cache, or else few (`warm`)."""
    if warm:
        return WARM_COPIES
    if detect().cuda is not None:
        return cold_copies(spec, shape, dtype)
    return min(max(CPU_BYTES // spec.cost(shape, dtype)[0], 2), 64)


def memory_of(num_bytes: int) -> Memory:
    """Where `num_bytes` in rotation come from."""
    cuda = detect().cuda
    if cuda is None:
        return "cpu"
    return "L2" if num_bytes < cuda.l2_bytes else "HBM"


def plain_copies(num_bytes: int, copies: int, device: torch.device) -> list[Callable[[], object]]:
    """The practical floor: a pointwise operator of torch reads and writes as many bytes, contiguous."""
    size = (copies, max(num_bytes // 16, 1) * 4)
    source, target = (torch.ones(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return [lambda i=i: torch.neg(source[i], out=target[i]) for i in range(copies)]  # type: ignore[misc]


def measure(
    spec: KernelSpec,
    shape: Shape,
    dtype: torch.dtype,
    variants: Sequence[Variant],
    ceilings: Ceilings,
    samples: int = 9,
    warm: bool = False,
    failed: Callable[[str, str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each variant, all over the same arguments, and first one for a plain copy of as many bytes.

    A variant that raises is left out, and `failed(what, why)` is told; without it, the error goes on its way.
    """
    copies = rotation(spec, shape, dtype, warm)
    on_gpu = detect().cuda is not None
    device = torch.device("cuda" if on_gpu else "cpu")
    inputs = rotated_inputs(spec, shape, dtype, copies, device)
    num_bytes, flops = spec.cost(shape, dtype)
    rate = "fp32_tflops" if on_gpu else "cpu_tflops"
    least = floor(num_bytes, flops, ceilings, memory_of(copies * num_bytes), rate)
    shared = {
        "kernel": spec.name,
        "case": dict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "copies": copies,
        "bytes": num_bytes,
        "flops": flops,
        "floor_us": least.us,
        "limit": least.limit,
    }
    copy = Variant("copy", spec.run)
    for variant in (copy, *variants):
        calls: list[Callable[[], object]] = [partial(variant.call, *args) for args in inputs]
        if variant is copy:
            calls = plain_copies(num_bytes, copies, device)
        try:
            us = spread(calls_us(calls, device.type, samples))
        except (RuntimeError, KernelError) as error:
            if failed is None:
                raise
            failed(f"{spec.name} {variant.name}", f"failed: {error}")
            continue
        config = None if variant.config is None else asdict(variant.config)
        rates = {"gbps": gbps(num_bytes, us["median"]), "fraction": least.fraction(us["median"])}
        yield {**shared, "version": variant.name, "config": config, "us": us, **rates}
