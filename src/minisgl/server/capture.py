"""`/profile/start` and `/profile/stop`: a capture of where time goes in this process and the engine's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from minisgl.server.client import AsyncEngineClient
from minisgl.server.errors import HttpError


class Recorder(Protocol):
    """Records the spans of this process, and writes traces. Handed in: the server doesn't know how it is done."""

    folder: str  # of the traces

    def start(self) -> None: ...
    def stop(self, engine_file: str | None) -> str:
        """Ends the recording; the path of the trace made of it and of what the engine wrote, if it wrote anything."""


@dataclass(slots=True)
class Capture:
    """The one capture that may be under way."""

    recorder: Recorder
    running: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # while it is begun or ended


async def start(capture: Capture | None, client: AsyncEngineClient) -> None:
    """Begins a capture.

    Raises:
        HttpError: captures are off (403), one is running, or the engine can't (409).
        EngineDeadError: the engine has ended.
    """
    capture = _allowed(capture)
    async with capture.lock:
        if capture.running:
            raise HttpError("a capture is running; POST /profile/stop ends it", None, 409, "profile_running")
        answer = await client.profile(capture.recorder.folder)
        if answer.error is not None:
            raise HttpError(f"the capture didn't begin: {answer.error}", None, 409, "profile_failed")
        capture.recorder.start()
        capture.running = True


async def stop(capture: Capture | None, client: AsyncEngineClient) -> str:
    """Ends the capture; the path of its trace.

    Raises:
        HttpError: captures are off (403), none is running, or it can't be written (409).
        EngineDeadError: the engine has ended.
    """
    capture = _allowed(capture)
    async with capture.lock:
        if not capture.running:
            raise HttpError("no capture is running; POST /profile/start begins one", None, 409, "profile_not_running")
        capture.running = False
        answer = await client.profile(None)
        try:
            path = await asyncio.to_thread(capture.recorder.stop, answer.path)
        except OSError as error:
            raise HttpError(f"the trace can't be written: {error}", None, 409, "profile_failed") from None
        if answer.error is not None:
            raise HttpError(f"the engine's capture failed: {answer.error}", None, 409, "profile_failed")
        return path


def _allowed(capture: Capture | None) -> Capture:
    if capture is None:
        raise HttpError("captures are off; start the server with --profile FOLDER", None, 403, "profile_off")
    return capture
