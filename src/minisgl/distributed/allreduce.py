"""An all-reduce that goes the way that was measured to be fastest for its size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minisgl.distributed.paths import ANYWHERE, MOST_ONE_SHOT, NEEDS, PathTable

Run = Callable[[Tensor], None]  # sums its argument over the ranks, in place
SHOT_DTYPES = (torch.float32, torch.bfloat16)  # that the shots add up
_ALIGN = 16  # bytes that torch's kernels load at a time


class AllReduce:
    """The paths that this group has, their workspaces, and the choice among them. Every rank chooses alike.

    `paths` has what runs each; `places` the workspaces (bytes), by the path for tensors at their beginning. Until
    `table` is set, everything goes `direct`.
    """

    def __init__(self, direct: Run) -> None:
        self.paths: dict[str, Run] = {"direct": direct}
        self.places: dict[str, Tensor] = {}
        self._table: PathTable | None = None
        self._chosen: dict[tuple[int, torch.dtype, bool], str] = {}
        self._spaces: dict[tuple[tuple[int, ...], torch.dtype], Tensor | None] = {}

    def add(self, name: str, run: Run, place: Tensor) -> None:
        """A path for tensors at the beginning of `place`, and with copies there and back for all others."""

        def copied(x: Tensor) -> None:
            space = view_of(place, tuple(x.shape), x.dtype)
            space.copy_(x)
            run(space)
            x.copy_(space)

        self.places[name] = place
        self.paths |= {name: run, f"{name}_copy": copied}

    @property
    def table(self) -> PathTable | None:
        return self._table

    @table.setter
    def table(self, table: PathTable) -> None:
        self._table = table
        self._chosen.clear()
        self._spaces.clear()

    def __call__(self, x: Tensor) -> None:
        if x.numel():
            self.paths[self.path_of(x)](x)

    def path_of(self, x: Tensor) -> str:
        """The way of `x`: if it lies in a workspace, by which; else what was measured for its size."""
        start = x.data_ptr()
        for path, place in self.places.items():
            if place.data_ptr() <= start < place.data_ptr() + place.nbytes:
                return path if start == place.data_ptr() else "direct"
        key = (x.nbytes, x.dtype, x.storage_offset() * x.element_size() % _ALIGN == 0)
        found = self._chosen.get(key)
        if found is None:
            found = self._chosen[key] = self._choose(x.nbytes, self.usable(*key))
        return found

    def _choose(self, num_bytes: int, paths: list[str]) -> str:
        return self._table.choose(num_bytes, paths) if self._table else "direct"

    def usable(self, num_bytes: int, dtype: torch.dtype, aligned: bool = True) -> list[str]:
        """The paths that can take such a tensor of the caller's. Nothing here differs between ranks."""
        fits = aligned and num_bytes % _ALIGN == 0 and dtype in SHOT_DTYPES
        return [p for p in ANYWHERE if p in self.paths and num_bytes <= self.limit(p) and (fits or "shot" not in p)]

    def limit(self, path: str) -> float:
        """Bytes of the largest tensor that `path` can take."""
        return self.places[NEEDS[path]].nbytes if path in NEEDS else MOST_ONE_SHOT if path == "one_shot" else math.inf

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Where writing into a workspace is faster than any way of a tensor from elsewhere: that workspace."""
        key = (tuple(shape), dtype)
        if key not in self._spaces:
            num_bytes = math.prod(shape) * dtype.itemsize
            anywhere = self.usable(num_bytes, dtype)
            in_place = [path for path in self.places if f"{path}_copy" in anywhere]
            best = self._choose(num_bytes, [*anywhere, *in_place]) if num_bytes else "direct"
            self._spaces[key] = view_of(self.places[best], *key) if best in self.places else None
        return self._spaces[key]

    def close(self) -> None:
        """Lets go of the workspaces."""
        self.paths, self.places = {"direct": self.paths["direct"]}, {}
        self._chosen.clear()
        self._spaces.clear()


def view_of(buffer: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The beginning of `buffer` (bytes) as a tensor of `shape`."""
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
