"""The start and the end of `NcclCommunicator` between two processes, with an NCCL that is none and no GPU.

What runs is our side of it: unique id, window, agreement on what every rank has, table, workspaces, errors.
"""

from __future__ import annotations

from pathlib import Path

import fake_nccl
from worlds import run_world

from minisgl.distributed.paths import PathTable


def test_communicator_starts_agrees_and_ends(tmp_path: Path) -> None:
    """The GPUs that aren't there can't reach one another, so the ranks do without torch's symmetric memory."""
    cache, seen = tmp_path / "cache", []
    for attempt in ("first", "second"):
        (folder := tmp_path / attempt).mkdir()
        seen.append(run_world(2, fake_nccl.start, str(folder), str(cache)))
    for first, second in seen:
        assert first == second
        paths, table, parts, kept, kept_after, error = first
        assert (kept, kept_after) == (True, False)
        assert paths == ["direct", "registered", "registered_copy"]
        assert parts == ["init", "map", "register", "settle"]
        assert error == "the group is closed"
        found = PathTable.from_json(table)
        assert found.machine.gpus == ("GPU;number 0", "GPU;number 1")
        assert found.machine.nccl == "2.28.9"
        assert max(found.us["direct"]) == 1 << 27
        assert max(found.us["registered"]) == 1 << 12  # what the window can't hold isn't timed
    assert seen[0][0][1] == seen[1][0][1]
    assert len(list(cache.rglob("*.json"))) == 1
