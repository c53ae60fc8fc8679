"""`Service`: what the routes serve from, and whether they may."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from minisgl.config import ServerConfig
from minisgl.messages import EngineReady
from minisgl.server.capture import Capture
from minisgl.server.client import AsyncEngineClient
from minisgl.server.errors import HttpError
from minisgl.server.responses import Health
from minisgl.text import Text
from minisgl.types import EngineDeadError


@dataclass(frozen=True, slots=True)
class Backend:
    """A loaded model: its text side, the way to its engine, and what that engine said it can do."""

    text: Text
    client: AsyncEngineClient
    limits: EngineReady


@dataclass(slots=True)
class Service:
    """State of the server. `status` is starting, ok, stopping or failed; requests are served while it is ok."""

    config: ServerConfig
    model_name: str
    status: str = "starting"
    error: str | None = None
    loaded: Backend | None = None
    capture: Capture | None = None  # for /profile/start and /profile/stop, where they are on

    def start(self, backend: Backend) -> None:
        """From here on requests are served."""
        self.loaded, self.status = backend, "ok"

    def backend(self) -> Backend:
        """
        Raises:
            EngineDeadError: the server isn't ready yet, or not any more.
        """
        if self.loaded is None or self.status != "ok":
            raise EngineDeadError(self.error or f"the server is {self.status}")
        return self.loaded

    def check_model(self, name: str) -> None:
        """
        Raises:
            HttpError: another model than the one that is served (404).
        """
        if name != self.model_name:
            text = f"the model {name!r} is not served here, only {self.model_name!r}"
            raise HttpError(text, "model", 404, "model_not_found")

    def health(self) -> Health:
        if self.loaded is None:
            return Health(self.status, self.error)
        client = self.loaded.client
        return Health(self.status, self.error, client.num_open, msgspec.structs.asdict(client.stats))
