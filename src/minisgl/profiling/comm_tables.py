"""The tables of communication times that this machine keeps, for people to read. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from minisgl.distributed.paths import Machine, PathTable, read_table
from minisgl.gguf_file import cache_dir


def cached_tables() -> list[PathTable]:
    """Every table that is kept on this machine, few ranks first."""
    found = (read_table(path) for path in sorted((cache_dir() / "comm").glob("*.json")))
    return sorted((t for t in found if t is not None), key=lambda t: len(t.machine.gpus))


def gpu_names(machine: Machine) -> tuple[str, ...]:
    """The name of each rank's GPU."""
    return tuple(gpu.partition(";")[0] for gpu in machine.gpus)


def ranges(table: PathTable, paths: Collection[str]) -> Iterator[tuple[int, str]]:
    """The best of `paths` by size: (largest bytes, path), from small to large; each path serves up to its bytes."""
    sizes = sorted({size for path in paths for size in table.us.get(path, {})})
    chosen = [(size, table.choose(size, paths)) for size in sizes]
    for (size, path), (_, after) in zip(chosen, [*chosen[1:], (0, "")], strict=True):
        if path != after:
            yield size, path
