"""The server's side of a capture: its own spans, and one trace of them and the engine's."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from minisgl.profiling.spans import Recorder, read_trace, write_trace
from minisgl.timing import set_span_hook


class ServerRecorder:
    """What `/profile/start` and `/profile/stop` ask for; see `server.capture.Recorder`. It loads no torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.absolute())  # the engine writes there too
        self._recorder: Recorder | None = None

    def start(self) -> None:
        self._recorder = Recorder("server")
        set_span_hook(self._recorder.span)

    def stop(self, engine_file: str | None) -> str:
        """Writes `trace-<time>.json`; the engine's file, which is part of it then, is removed."""
        set_span_hook(None)
        assert self._recorder is not None
        spans, facts = self._recorder.spans(), {"dropped": self._recorder.dropped}
        self._recorder = None
        if engine_file is not None:
            more, engine_facts = read_trace(Path(engine_file))
            spans, facts = (
                spans + more,
                {**engine_facts, **facts, "dropped": facts["dropped"] + engine_facts["dropped"]},
            )
            Path(engine_file).unlink()
        now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        return str(write_trace(Path(self.folder) / f"trace-{now}.json", spans, facts))
