"""schemathesis: requests made up from the server's own OpenAPI document, answers held against it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from servers import Server, running, tiny_options


@pytest.fixture(scope="module")
def short(tiny_model: Path) -> Iterator[Server]:
    """A server whose answers can't get long."""
    with running(*tiny_options(tiny_model), "--max-model-len", "64") as server:
        yield server.wait_ready()


@pytest.mark.parametrize(
    "options",
    [
        ["--phases=fuzzing", "--max-examples=15", "--seed=1"],
        pytest.param(["--phases=examples,coverage,fuzzing", "--max-examples=200"], marks=pytest.mark.slow),
    ],
    ids=["short", "long"],
)
def test_every_answer_is_as_documented(short: Server, options: list[str], tmp_path: Path) -> None:
    # What can't be told in a schema: which ids there are, what fits into the context, what a template refuses.
    options += ["--exclude-checks=positive_data_acceptance", "--warnings=off", "--no-color"]
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{short.url}/openapi.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 selected / 11 total" in done.stdout
    assert short.health().status_code == 200


def test_document_has_every_route_and_schema(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    posts = {path for path, methods in document["paths"].items() if "post" in methods}
    profile = {"/profile/start", "/profile/stop"}
    assert posts == {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/abort"} | profile
    refused = document["paths"]["/abort"]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"]
    assert refused["$ref"].rpartition("/")[2] in document["components"]["schemas"]
