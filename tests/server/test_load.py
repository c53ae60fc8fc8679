"""Many clients at once, the end of a server under load, and a soak."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from load import Load, quiet, resources
from servers import Server, alive, running, tiny_options

NUM_CLIENTS = 64
SOAK_S = float(os.environ.get("SOAK_S", "300"))
SLACK_BYTES = 30 * 2**20


def test_clients_come_and_go_and_sigterm_drains_under_load(tiny_model: Path, tmp_path: Path) -> None:
    with running(*tiny_options(tiny_model), env={"TMPDIR": str(tmp_path)}) as server:
        engine = server.wait_ready().engine_pid()
        asyncio.run(_load_and_sigterm(server))
        assert server.exit_code() == 0
    assert not alive(engine)
    assert list(tmp_path.glob("minisgl-*")) == []
    assert "Traceback" not in server.output


async def _load_and_sigterm(server: Server) -> None:
    load = Load(server, NUM_CLIENTS)
    await asyncio.sleep(3)
    async with asyncio.timeout(60):
        while not all(load.counts[kind] for kind in ("answered", "left", "aborted", "nonsense")):
            await asyncio.sleep(0.1)
    assert load.wrong == []
    answered = load.counts["answered"]
    load.stopping = True
    server.process.send_signal(signal.SIGTERM)
    await load.stop()
    assert load.wrong == []
    assert load.counts["failed"] == 0  # answers under way ended as ever
    assert load.counts["answered"] > answered


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S * 1.5 + 120)
def test_soak_leaves_pages_files_and_memory_as_they_were(tiny_model: Path, tmp_path: Path) -> None:
    with running(*tiny_options(tiny_model), env={"TMPDIR": str(tmp_path)}) as server:
        server.wait_ready()
        _soak(server, SOAK_S / 5)  # caches fill, allocators grow
        before = resources(server)
        _soak(server, SOAK_S)
        after = resources(server)
        print(before, after)
        for name in before:
            assert after[name][0] <= before[name][0] + 2, (before, after)
            assert after[name][1] < before[name][1] * 1.05 + SLACK_BYTES, (before, after)
        engine = server.engine_pid()
        asyncio.run(_load_and_kill(server, engine))
        assert server.exit_code() == 1
    assert not alive(engine)
    assert list(tmp_path.glob("minisgl-*")) == []
    assert "Traceback" not in server.output


def _soak(server: Server, seconds: float) -> None:
    async def run() -> None:
        load = Load(server, NUM_CLIENTS)
        await asyncio.sleep(seconds)
        await load.stop()
        print(load.counts)
        assert load.wrong == []

    asyncio.run(run())
    quiet(server)


async def _load_and_kill(server: Server, engine: int) -> None:
    load = Load(server, NUM_CLIENTS)
    await asyncio.sleep(3)
    load.stopping = True
    os.kill(engine, signal.SIGKILL)
    await load.stop()
    assert load.wrong == []
    assert load.counts["failed"] or load.counts["refused"]
