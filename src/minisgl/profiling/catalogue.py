"""Everything that the laboratory tests: the kernel registry, and what other parts of the engine add to it.

A module in `PROVIDERS` calls `register` when it is imported, as a kernel's folder does: the prefix tree, which belongs
to `cache/`, and collectives (kind 'collective'), which belong to `distributed/`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from minisgl.kernels.spec import KernelSpec, registry

PROVIDERS = ("minisgl.profiling.radix_cases", "minisgl.profiling.collective_cases")


def catalogue() -> Mapping[str, KernelSpec]:
    """Every kernel by name."""
    for name in PROVIDERS:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    return registry()
