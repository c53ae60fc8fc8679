"""Input and output of a batch job, for the tests of such jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minisgl.cli import main

Record = dict[str, Any]
SHORT = {"max_tokens": 5, "ignore_eos": True, "temperature": 0}


class Files:
    """Input and output of a job."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target

    def put(self, *lines: Any) -> None:
        self.source.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def run(self, *options: str, model: str = "tiny") -> int:
        arguments = ["--input", str(self.source), "--output", str(self.target), "--model", model, *options]
        return main(["generate", *arguments])

    def answers(self) -> dict[int, Record]:
        """Records by line; a line must not have two."""
        records = [json.loads(line) for line in self.target.read_bytes().splitlines()]
        by_line = {record["line"]: record for record in records}
        assert len(by_line) == len(records), "a line was answered twice"
        return by_line


def prompts(count: int) -> list[Record]:
    return [{"prompt": f"Prompt {i}", **SHORT} for i in range(count)]
