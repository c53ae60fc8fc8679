"""The file of a batch job's answers: only ever appended to, and always fit to be continued.

A record is one JSON line that begins with the number and the digest of the line it answers, written by one call. So
whatever ends the job, the file holds whole records and at most one that is torn, the last; opening it again cuts that
one off. Records reach the disk at the latest a second after they were written.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minisgl.cli.batch_input import Line
from minisgl.types import ConfigError, MinisglError

SYNC_S = 1.0
_START = b'{"line": '


class AnswerFile:
    """The answers at `path`, those of earlier runs included.

    Args:
        settings: digest of what shapes the answers besides the input: model and options.

    Raises:
        ConfigError: the file can't be had, is in use, or isn't one of ours.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self._path = path
        self._settings = settings
        self.answered: dict[int, str] = {}  # by line: its digest
        self.custom_ids: dict[str, int] = {}  # the first line with each
        self.num_errors = 0
        self._synced = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise self._problem(f"can't be written: {error.strerror}") from None
        try:
            self._lock()
            self._resume()
        except BaseException:
            os.close(self._file)
            raise

    def _problem(self, text: str) -> ConfigError:
        return ConfigError(f"{self._path} {text}")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._problem("is being written by another run") from None
        except OSError:
            pass  # a file system without locks

    def _resume(self) -> None:
        """Reads what is there and cuts off a torn last record."""
        whole = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, data in enumerate(file, 1):
                record = _parse(data)
                if record is not None:
                    self._remember(record)
                    whole += len(data)
                elif _may_be_torn(data) and not file.read(1):
                    os.ftruncate(self._file, whole)
                    return
                else:
                    raise self._problem(f"holds something else than answers in line {number}; choose another --output")

    def _remember(self, record: dict[str, Any]) -> None:
        settings, _, digest = str(record["digest"]).partition("-")
        if settings != self._settings:
            raise self._problem(
                "was begun with another model or other options that change answers (--max-tokens, --temperature, "
                "--ignore-eos, --system, --seed …); use the same again, or choose another --output"
            )
        self.answered[record["line"]] = digest
        self.num_errors += is_error(record)
        if isinstance(custom_id := record.get("custom_id"), str):
            first = self.custom_ids.setdefault(custom_id, record["line"])
            self.custom_ids[custom_id] = min(first, record["line"])

    def check(self, lines: Iterable[Line]) -> int:
        """Compares the answers with the input they claim to answer.

        Returns:
            The number of lines.

        Raises:
            ConfigError: a line with an answer has changed or is gone.
        """
        count, missing = 0, dict.fromkeys(self.answered)
        for count, line in enumerate(lines, 1):  # noqa: B007
            if line.number in missing:
                del missing[line.number]
                if self.answered[line.number] != line.digest:
                    raise self._changed(line.number, "has changed since it was answered in")
        if missing:
            raise self._changed(next(iter(missing)), "is gone, but has an answer in")
        return count

    def _changed(self, number: int, what: str) -> ConfigError:
        return ConfigError(
            f"line {number} of the input {what} {self._path}; choose another --output, or delete that answer"
        )

    def write(self, line: Line, record: dict[str, Any]) -> None:
        """Appends the answer to `line`.

        Raises:
            MinisglError: the disk is full or gone.
        """
        assert line.number not in self.answered, "a line is answered once"
        full = {"line": line.number, "digest": f"{self._settings}-{line.digest}", **record}
        data = memoryview(json.dumps(full).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._file, data) :]
            if time.monotonic() - self._synced > SYNC_S:
                self._sync()
        except OSError as error:
            raise MinisglError(
                f"can't write to {self._path}: {error.strerror}; the same command continues once that is mended"
            ) from None
        self.answered[line.number] = line.digest
        self.num_errors += is_error(full)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self._sync()
        finally:
            os.close(self._file)


def is_error(record: dict[str, Any]) -> bool:
    """Whether a record says that its line could not be answered."""
    response = record.get("response")
    return bool(record.get("error")) or (isinstance(response, dict) and response.get("status_code") != 200)


def _parse(data: bytes) -> dict[str, Any] | None:
    if not (data.startswith(_START) and data.endswith(b"\n")):
        return None
    try:
        record = json.loads(data)
    except ValueError:
        return None
    ours = isinstance(record, dict) and isinstance(record.get("line"), int) and isinstance(record.get("digest"), str)
    return record if ours else None


def _may_be_torn(data: bytes) -> bool:
    """Whether `data` can be the beginning of a record; after a power cut a file may end in zeros."""
    data = data.rstrip(b"\0")
    return data.startswith(_START) or _START.startswith(data)
