"""What a measurement leaves: one JSON file a kind, with machine, versions and commit beside the rows.

`new_record` fills in where and with what; `Record.write` and `read` are the file's two ways. Benchmarks and the
commands share `commit_id` and `installed_versions`, so that every figure of this project names its origin alike.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import minisgl
from minisgl.hardware import Hardware, detect
from minisgl.types import MinisglError

SCHEMA = 1
PACKAGES = ("minisgl", "torch", "triton", "numpy", "cuda-core")
_REQUIRED = ("kind", "schema", "time", "commit", "quick", "hardware", "versions", "rows")


@dataclass(frozen=True, slots=True)
class Record:
    """One run of one kind of measurement; units are in the names (`us`, `gbps`, `bytes`).

    Args:
        kind: what was measured; also the file's name.
        time: when, ISO 8601 in UTC. commit: of the sources, '+' behind it where files differ from it.
        quick: few sizes and samples, to see that it works: no figures to compare with.
        hardware: the machine, from `describe`. versions: packages, by name.
        ceilings: what the hardware was measured to allow (`launch_us`, `hbm_gbps`, …), as far as this kind needs it.
        skipped: `{"what": …, "why": …}` for each thing that this machine couldn't run.
        rows: the measurements. summary: what follows from them.
    """

    kind: str
    time: str
    commit: str
    quick: bool
    hardware: dict[str, Any]
    versions: dict[str, str]
    ceilings: dict[str, float] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def skip(self, what: str, why: str) -> None:
        """Notes that `what` was left out, once."""
        note = {"what": what, "why": why}
        if note not in self.skipped:
            self.skipped.append(note)

    def write(self, folder: Path) -> Path:
        """Writes `<kind>.json` into `folder`, which is made if need be.

        Raises:
            MinisglError: it can't be written.
        """
        path = folder / f"{self.kind}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise MinisglError(f"can't write {path}: {error.strerror}; choose another folder with --out") from None
        return path


def new_record(kind: str, quick: bool) -> Record:
    """A record without rows: made now, on this machine, from this commit."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(kind, now, commit_id() or "unknown", quick, describe(detect()), installed_versions())


def read(path: Path) -> Record:
    """Reads a record; fields that are not known here are ignored.

    Raises:
        MinisglError: the file isn't there, isn't a record, or follows another schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MinisglError(f"can't read {path}: {error.strerror}; `minisgl profile` writes such files") from None
    except ValueError as error:
        raise MinisglError(f"{path} holds no JSON ({error}); measure again") from None
    missing = [name for name in _REQUIRED if name not in found] if isinstance(found, dict) else list(_REQUIRED)
    if missing:
        raise MinisglError(f"{path} is no record of a measurement: it lacks {', '.join(missing)}")
    if found["schema"] != SCHEMA:
        raise MinisglError(f"{path} follows schema {found['schema']}; this version reads {SCHEMA}: measure again")
    return Record(**{f.name: found[f.name] for f in fields(Record) if f.name in found})


def describe(hardware: Hardware) -> dict[str, Any]:
    """The machine as a record keeps it: `name` is the GPU's or else the CPU's, `cuda` None or the GPU's facts."""
    facts = asdict(hardware)
    place = hardware.cuda.name if hardware.cuda else f"{hardware.cpu}, {hardware.num_cores} cores"
    load = round(os.getloadavg()[0], 1)  # who else was at work
    return {"name": place, "load": load, "device": "cuda" if hardware.cuda else "cpu", **facts}


def installed_versions() -> dict[str, str]:
    """The packages that a figure depends on, as far as they are installed."""
    found = {"minisgl": minisgl.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit_id(but: str | None = None) -> str | None:
    """The commit that is measured, '+' behind it if tracked files differ from it.

    $MINISGL_COMMIT, else that of the checkout of this project that the package, or the current folder, lies in; None
    if neither does.

    Args:
        but: a folder of the checkout whose changes don't count: the one that results go to.
    """
    if named := os.environ.get("MINISGL_COMMIT"):
        return named
    for folder in (Path(__file__).resolve().parent, Path.cwd()):
        if found := _commit_of(folder, but):
            return found
    return None


def _commit_of(folder: Path, but: str | None) -> str | None:
    git = ["git", "-C", str(folder)]
    try:
        asked = [*git, "rev-parse", "--show-toplevel", "HEAD"]
        found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split("\n")
        top, commit = Path(found[0]), found[1]
        if not (top / "src" / "minisgl" / "__init__.py").is_file():
            return None  # some other project's repository
        changed = [*git, "diff", "--quiet", "HEAD", "--", ":/", *([f":(top,exclude){but}"] if but else [])]
        dirty = subprocess.run(changed, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit[:12] + "+" * (dirty != 0)
