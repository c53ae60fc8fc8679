"""Clients that come, go, break off and ask nonsense at random, and what became of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from servers import Server

PROMPTS = [f"{word} upon a time there was " for word in ("once", "twice", "never", "ever")]
LENGTHS = (1, 8, 40, 120)
NONSENSE = [{"prompt": "x", "n": 0}, {"prompt": [-1]}, {"prompt": "x", "temperature": -1}, {"prompt": "\ud800"}, {}]


class Load:
    """Keeps `num_clients` clients busy with a server until `stop`.

    `counts` has what became of their requests by kind; `wrong` what should never happen. Greedy answers of the same
    prompt and length must be the same text.
    """

    def __init__(self, server: Server, num_clients: int, seed: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stopping = False  # the server was told to end, or has died: requests may be refused
        self._answers: dict[tuple[str, int], str] = {}
        self._server = server
        self._tasks = [asyncio.create_task(self._client(random.Random(seed + i))) for i in range(num_clients)]
        self._over = False

    async def stop(self, timeout: float = 60) -> None:
        """Lets every client end what it does."""
        self._over = True
        done, late = await asyncio.wait(self._tasks, timeout=timeout)
        for task in late:
            task.cancel()
            self.wrong.append("a client waits for ever")
        for task in done:
            task.result()

    async def _client(self, rng: random.Random) -> None:
        async with httpx.AsyncClient(base_url=self._server.url, timeout=60) as http:
            while not self._over:
                act = rng.choice([self._whole, self._stream, self._leave, self._leave, self._abort, self._nonsense])
                try:
                    await act(http, rng)
                except httpx.HTTPError as error:
                    self._note("lost", not self.stopping, repr(error))
                    if self.stopping and isinstance(error, httpx.ConnectError):
                        return

    def _note(self, kind: str, wrong: bool = False, detail: object = "") -> None:
        self.counts[kind] += 1
        if wrong:
            self.wrong.append(f"{kind}: {detail}")

    def _body(self, rng: random.Random, stream: bool) -> dict[str, Any]:
        fields = {"prompt": rng.choice(PROMPTS), "max_tokens": rng.choice(LENGTHS), "stream": stream}
        return {**fields, "temperature": 0, "ignore_eos": True}

    def _check(self, body: dict[str, Any], text: str, reason: str) -> None:
        expected = self._answers.setdefault((body["prompt"], body["max_tokens"]), text)
        self._note("answered", reason != "length" or text != expected, (reason, text, expected))

    def _refused(self, response: httpx.Response, text: str) -> None:
        self._note("refused", response.status_code != 503 or not self.stopping, text)

    async def _whole(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        body = self._body(rng, stream=False)
        response = await http.post("/v1/completions", json=body)
        if response.status_code != 200:
            return self._refused(response, response.text)
        [choice] = response.json()["choices"]
        self._check(body, choice["text"], choice["finish_reason"])

    async def _stream(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        await self._read(http, self._body(rng, stream=True), limit=None)

    async def _leave(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        if rng.random() < 0.5:
            await self._read(http, self._body(rng, stream=True), limit=rng.choice([0, 1, 5, 30]))
            return
        with_timeout = httpx.Timeout(60, read=rng.choice([0.001, 0.02, 0.1]))
        try:
            await http.post("/v1/completions", json=self._body(rng, stream=False), timeout=with_timeout)
        except httpx.ReadTimeout:
            self._note("left")

    async def _read(
        self, http: httpx.AsyncClient, body: dict[str, Any], limit: int | None, abort: bool = False
    ) -> None:
        """Reads a stream to its end, or leaves it after `limit` events."""
        text, num_events, reason = "", 0, None
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return self._refused(response, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    break
                if not line:
                    continue
                if num_events == limit:
                    return self._note("left")
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return self._note("failed", not self.stopping, event)
                if abort and num_events == 0:
                    self._note("abort sent")
                    await http.post("/abort", json={"request_id": event["id"]})
                num_events += 1
                text += event["choices"][0]["text"]
                reason = event["choices"][0]["finish_reason"]
        if reason == "abort":
            return self._note("aborted", not abort)
        self._check(body, text, str(reason))

    async def _abort(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        await self._read(http, self._body(rng, stream=True) | {"max_tokens": 2000}, limit=None, abort=True)

    async def _nonsense(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        content = json.dumps(rng.choice(NONSENSE))
        response = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        self._note("nonsense", response.status_code != 400 and not self.stopping, response.text)


def resources(server: Server) -> dict[str, tuple[int, int]]:
    """File descriptors and resident bytes of the server's process and its engine's."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = {}
    for name, pid in (("server", server.process.pid), ("engine", server.engine_pid())):
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
        found[name] = (len(os.listdir(f"/proc/{pid}/fd")), resident)
    return found


def quiet(server: Server, timeout: float = 30) -> None:
    """Waits until the server has nothing to do, and asserts that every page is free or evictable."""
    deadline = time.monotonic() + timeout
    while True:
        health = server.health().json()
        counts = health["engine"]
        if not (counts["num_running"] or counts["num_waiting"] or health.get("open_requests")):
            break
        assert time.monotonic() < deadline, health
        time.sleep(0.05)
    assert counts["num_free_pages"] + counts["num_evictable_pages"] == counts["num_pages"]
