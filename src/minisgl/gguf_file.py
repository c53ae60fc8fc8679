"""What both the engine and the API process read of a model's files: JSON, and the header of a GGUF file.

The gguf package needs seconds to open a file with a large vocabulary (it builds a NumPy view for every token);
so what it read, metadata and tensor places, is kept as msgpack beside other caches, keyed by the file's identity.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from minisgl.types import ModelError

_FORMAT = 1  # of the cache; bump when GGUFFile changes


class GGUFTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies. `shape` is in PyTorch's order (slowest dimension first)."""

    name: str
    shape: tuple[int, ...]
    type: str  # name of gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


class GGUFFile(msgspec.Struct, frozen=True):
    """The header of a GGUF file: metadata as plain Python values, tensors by name."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def cache_dir() -> Path:
    """$MINISGL_CACHE, else minisgl under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MINISGL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisgl"


def _cache_path(path: Path) -> Path:
    stat = path.stat()
    with path.open("rb") as f:
        head = f.read(1 << 16)
    key = f"{_FORMAT}:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()
    return cache_dir() / "gguf" / (hashlib.sha256(key + head).hexdigest()[:32] + ".msgpack")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that a reader sees all of it or nothing; a folder that can't be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
            f.write(data)
        os.replace(f.name, path)
    except OSError:
        pass


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        ModelError: the file can't be read, isn't JSON, or holds no object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{file} is no readable JSON: {e}") from e
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}; expected an object")
    return value


def _parse(path: Path) -> GGUFFile:
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        tensors = {
            t.name: GGUFTensor(
                name=t.name,
                shape=tuple(int(n) for n in reversed(t.shape)),
                type=t.tensor_type.name,
                offset=int(t.data_offset),
                num_bytes=int(t.n_bytes),
            )
            for t in reader.tensors
        }
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as e:
        raise ModelError(f"{path} is no readable GGUF file: {e}") from e
    return GGUFFile(str(path), metadata, tensors)


def read_gguf(path: str | Path) -> GGUFFile:
    """The header of the GGUF file at `path`, from the cache if the file is the one read before.

    Raises:
        ModelError: the file is missing, isn't GGUF, or is shorter than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    cached = _cache_path(path)
    try:
        file = msgspec.convert(msgspec.msgpack.decode(cached.read_bytes()), GGUFFile)
        return msgspec.structs.replace(file, path=str(path))  # it may have been read under another name
    except (OSError, msgspec.MsgspecError):
        pass
    file = _parse(path)
    size = path.stat().st_size
    for t in file.tensors.values():
        if t.offset + t.num_bytes > size:
            end = t.offset + t.num_bytes
            raise ModelError(f"{path} is cut short: tensor {t.name} ends at byte {end}, the file at {size}")
    write_atomically(cached, msgspec.msgpack.encode(file))
    return file
