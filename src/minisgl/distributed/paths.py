"""Which way an all-reduce takes: a table of times that this machine was measured to need, and the choice from it.

Nothing here communicates or touches a GPU. A path's name says what it does (`nccl.py` and `symmetric.py` do it):

- `direct`: NCCL on the caller's tensor.
- `registered`: NCCL on a tensor in the buffer that is registered as a symmetric window; `registered_copy`: the caller's
  tensor is copied there and back.
- `one_shot`: every rank writes its data to all others, which add up what comes (a tensor from anywhere, of up to
  MOST_ONE_SHOT bytes), by a kernel of ours: `triton_one_shot.py`.
- `two_shot`: every rank sums its share, then writes it to all others, for a tensor in torch's symmetric memory;
  `two_shot_copy`: the caller's tensor is copied there and back.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from minisgl.gguf_file import cache_dir, write_atomically

ANYWHERE = ("direct", "one_shot", "two_shot_copy", "registered_copy")  # for a tensor of the caller's
# The workspace that a path needs; its name is that of the path for tensors that lie in it.
NEEDS = {p: p.removesuffix("_copy") for p in ("registered", "registered_copy", "two_shot", "two_shot_copy")}
MOST_ONE_SHOT = 1 << 20


class Machine(msgspec.Struct, frozen=True):
    """What the times depend on. `gpus` has the name and, after a `;`, the UUID of each rank's GPU."""

    gpus: tuple[str, ...]
    driver: str
    nccl: str
    torch: str


class PathTable(msgspec.Struct, frozen=True):
    """Microseconds of an all-reduce by path and by bytes, as measured on `machine`.

    `us[path]` ends at the largest tensor that the path can take.
    """

    machine: Machine
    us: Mapping[str, Mapping[int, Annotated[float, msgspec.Meta(gt=0)]]]

    def estimate(self, path: str, num_bytes: int) -> float:
        """Microseconds for `num_bytes`, between two measured sizes along the line that joins them in log-log scale.

        Infinite where the path wasn't measured or can't take as much; below the smallest size, that size's time.
        """
        times = self.us.get(path, {})
        sizes = sorted(times)
        if not sizes or num_bytes > sizes[-1]:
            return math.inf
        at = bisect.bisect_left(sizes, num_bytes)
        if at == 0 or sizes[at] == num_bytes:
            return times[sizes[at]]
        low, high = sizes[at - 1], sizes[at]
        share = math.log(num_bytes / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(times[low]) + share * math.log(times[high]))

    def choose(self, num_bytes: int, paths: Collection[str]) -> str:
        """The fastest of `paths` for `num_bytes`; `direct`, which takes any size, where none was measured."""
        best = min(sorted(paths), key=lambda path: self.estimate(path, num_bytes), default="direct")
        return best if math.isfinite(self.estimate(best, num_bytes)) else "direct"

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> PathTable:
        """Raises msgspec.MsgspecError or UnicodeDecodeError where `data` is no table."""
        return msgspec.json.decode(data, type=cls)


def table_file(machine: Machine) -> Path:
    """Where the table for `machine` and as many ranks as it has GPUs is kept."""
    key = hashlib.sha256(msgspec.json.encode(machine)).hexdigest()[:16]
    return cache_dir() / "comm" / f"{len(machine.gpus)}-{key}.json"


def load_table(machine: Machine) -> PathTable | None:
    """The table that was kept for `machine`; None if there is none, or none that can be read."""
    found = read_table(table_file(machine))
    return found if found is not None and found.machine == machine else None


def read_table(path: Path) -> PathTable | None:
    """The table in a file; None if there is none, or none that can be read."""
    try:
        return PathTable.from_json(path.read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def keep_table(table: PathTable) -> None:
    """Keeps `table` for the next start; a folder that can't be written is no error."""
    write_atomically(table_file(table.machine), table.to_json())
