"""The kernel registry: what every kernel is, which versions it has, and where each of them works.

A kernel is a folder. Its `op.py` has the public function and defines the `Kernel`: all that the engine needs to launch
it. Its `cases.py` makes that a `KernelSpec`: reference, inputs, sizes, and the versions in `ladder/`, which the engine
doesn't run but which taught something. Tests, benchmarks and reports iterate `registry()`, which loads both; the
engine never loads `cases.py`. To add a kernel is to add a folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from minisgl.kernels.nvrtc import Build, Capability, arch_of, capability
from minisgl.kernels.tuning import Config, choose
from minisgl.types import KernelError

Kind = Literal["cuda", "triton", "cpu", "collective"]
Shape = Mapping[str, int]  # the sizes that describe a call, by name
Run = Callable[..., None]
_MAX_PLANS = 4096
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Version:
    """One implementation of a kernel.

    `supports` returns None where the version works, else the reason why not. `prepare` settles everything but the
    tensors for a device, dtype and shape; `builds` are typical compilations, which CI makes for every architecture.
    `fixed`: sweeps over configurations leave it out.
    """

    name: str
    kind: Kind
    supports: Callable[[Capability, torch.dtype, Shape], str | None]
    prepare: Callable[[int, torch.dtype, Shape, Config], Run]
    builds: tuple[Build, ...] = ()
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """What it takes to launch a kernel.

    Args:
        versions: best first.
        sizes: names of the sizes that a version needs to know, in the order in which `launcher` gets them.
        cost: `(shape, dtype)` → bytes that must move, floating-point operations.
    """

    name: str
    versions: tuple[Version, ...]
    sizes: tuple[str, ...]
    cost: Callable[[Shape, torch.dtype], tuple[int, int]]

    @property
    def kind(self) -> Kind:
        """Kind of the version that is preferred."""
        return self.versions[0].kind

    @property
    def on_gpu(self) -> bool:
        return self.kind in ("cuda", "triton")

    def version(self, name: str) -> Version:
        for version in self.versions:
            if version.name == name:
                return version
        raise KernelError(f"{self.name} has no version {name!r}; it has {', '.join(v.name for v in self.versions)}")

    def select(self, where: Capability, dtype: torch.dtype, shape: Shape) -> Version:
        """The first version that supports the call.

        Raises:
            KernelError: none does; lists the reason of each.
        """
        reasons = []
        for version in self.versions:
            reason = version.supports(where, dtype, shape)
            if reason is None:
                return version
            reasons.append(f"\n  {version.name} ({version.kind}): {reason}")
        sizes = ", ".join(f"{k}={v}" for k, v in shape.items())
        listed = "".join(reasons)
        raise KernelError(f"no version of {self.name} fits {dtype} on {arch_of(where)} with {sizes}:{listed}")


@dataclass(frozen=True, slots=True)
class KernelSpec(Kernel):
    """A kernel with all that is needed to test and to measure it.

    Args:
        run: the public function; takes `version` (a name) besides its arguments, on a GPU also `config`.
        reference: plain torch on any device, writes the same arguments.
        library: torch's own operator for the same work, or the nearest composition of them.
        inputs: `(shape, dtype, device, generator, copies)` → that many tuples of arguments for `run`, which share what
            calls of a model share (tables, caches, weights) and nothing else.
        outputs: positions of the arguments that a call writes; updated: of those that it reads and writes.
        tolerance: by dtype served, the largest ‖out − reference‖ / ‖reference‖; 0 means equal bit for bit.
        cases: shapes for tests, odd sizes among them. bench: shapes for benchmarks.
        tunable: shapes that `profile tune` measures, over `configs`.
        builds: typical compilations of the versions that the engine runs, as in `Version`.
        error: `(arguments after the call, after the reference)` → what `tolerance` bounds instead of that norm.
    """

    run: Run
    reference: Run
    library: Run
    inputs: Callable[[Shape, torch.dtype, torch.device, torch.Generator, int], list[tuple[Any, ...]]]
    outputs: tuple[int, ...]
    updated: tuple[int, ...]
    tolerance: Mapping[torch.dtype, float]
    cases: tuple[Shape, ...]
    bench: tuple[Shape, ...]
    tunable: tuple[Shape, ...] = ()
    configs: tuple[Config, ...] = ()
    builds: tuple[Build, ...] = ()
    error: Callable[[tuple[Any, ...], tuple[Any, ...]], float] | None = None


_registry: dict[str, Kernel] = {}
K = TypeVar("K", bound=Kernel)


def register(kernel: K) -> K:
    """Puts `kernel` into the registry; a `KernelSpec` takes the place of the `Kernel` that it completes."""
    known = _registry.get(kernel.name)
    assert known is None or type(known) is Kernel, f"kernel {kernel.name} is registered twice"
    _registry[kernel.name] = kernel
    return kernel


@lru_cache(maxsize=8192)
def launcher(
    kernel: str, device: int, dtype: torch.dtype, version: str | None, config: Config | None, *sizes: int
) -> Run:
    """What launches `kernel` for a call of `sizes`: by `version` or the one that fits, by `config` or the tuned one.

    Raises:
        KernelError: no version fits, or not the one asked for.
    """
    spec = _registry[kernel]
    if version and version not in [v.name for v in spec.versions]:
        spec = registry()[kernel]  # the laboratory has more
    shape = dict(zip(spec.sizes, sizes, strict=True))
    where = capability(device)
    chosen = spec.version(version) if version else spec.select(where, dtype, shape)
    reason = chosen.supports(where, dtype, shape)
    if reason is not None:
        raise KernelError(f"version {version} of {kernel} doesn't fit: {reason}")
    return chosen.prepare(device, dtype, shape, config or choose(kernel, device, spec.cost(shape, dtype)[0]))


def by_layout(plan: Callable[..., Run]) -> Callable[..., Run]:
    """Remembers what `plan(tensors, *options)` returned for tensors that look the same.

    The same: shape, strides, dtype, device and place within 16 bytes. So a public function checks its arguments and
    chooses its launch once for each of those, not at every call; that is more than half of a call's host time.
    """
    plans: dict[tuple[object, ...], Run] = {}

    def find(tensors: tuple[Tensor | None, ...], *options: object) -> Run:
        looks = [x if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15) for x in tensors]
        key = (*looks, options)
        found = plans.get(key)
        if found is None:
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            found = plans[key] = plan(tensors, *options)
        return found

    return find


def nothing(*_: object) -> None:
    """The plan for tensors without elements."""


def fits(where: Capability, dtype: torch.dtype, shape: Shape) -> str | None:
    """`supports` of a version that serves every call which passed the checks."""
    return None


@cache
def _load_all() -> None:
    import minisgl.kernels as package

    for folder in pkgutil.iter_modules(package.__path__):
        for part in ("op", "cases"):
            module = f"{package.__name__}.{folder.name}.{part}"
            if folder.ispkg and importlib.util.find_spec(module):
                importlib.import_module(module)


def registry() -> Mapping[str, KernelSpec]:
    """Every kernel by name."""
    _load_all()
    return {name: kernel for name, kernel in _registry.items() if isinstance(kernel, KernelSpec)}
