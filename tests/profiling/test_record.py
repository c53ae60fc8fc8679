"""The JSON that measurements leave: what it says of its origin, and that it reads back."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import minisgl
from minisgl.hardware import CudaDevice, Hardware
from minisgl.profiling import record
from minisgl.profiling.record import Record, commit_id, describe, new_record, read
from minisgl.types import MinisglError


def test_new_record_says_where_with_what_and_when() -> None:
    made = new_record("index", quick=True)
    assert (made.kind, made.quick, made.schema, made.rows) == ("index", True, record.SCHEMA, [])
    assert made.hardware["name"] and made.hardware["num_cores"] >= 1
    assert made.versions["minisgl"] == minisgl.__version__ and made.versions["torch"]
    assert made.time.endswith("+00:00")


def test_record_reads_back(tmp_path: Path) -> None:
    made = replace(new_record("store", quick=False), ceilings={"cpu_gbps": 12.5}, rows=[{"us": {"median": 1.0}}])
    made.skip("store v2", "no GPU")
    made.skip("store v2", "no GPU")
    path = made.write(tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "store.json"
    found = read(path)
    assert found == Record(**json.loads(json.dumps(asdict(made))))
    assert found.skipped == [{"what": "store v2", "why": "no GPU"}]


def test_read_ignores_fields_of_later_versions(tmp_path: Path) -> None:
    path = new_record("index", quick=True).write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": "good"}))
    assert read(path).kind == "index"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no JSON"),
        ("[]", "is no record of a measurement"),
        ('{"kind": "index"}', "lacks schema, time, commit"),
        (None, "can't read"),
    ],
)
def test_read_says_what_is_wrong(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MinisglError, match=message):
        read(path)


def test_read_refuses_another_schema(tmp_path: Path) -> None:
    path = replace(new_record("index", quick=True), schema=99).write(tmp_path)
    with pytest.raises(MinisglError, match="follows schema 99"):
        read(path)


def test_write_says_where_it_could_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MinisglError, match="--out"):
        new_record("index", quick=True).write(tmp_path / "file")


def test_describe_prefers_the_gpu() -> None:
    gpu = CudaDevice("a GPU", (9, 0), 132, 50 << 20, 80 << 30)
    with_gpu = describe(Hardware("a CPU", 4, 1 << 30, gpu))
    assert (with_gpu["name"], with_gpu["device"], with_gpu["cuda"]["num_sms"]) == ("a GPU", "cuda", 132)
    without = describe(Hardware("a CPU", 4, 1 << 30, None, "no driver"))
    assert (without["name"], without["device"], without["cuda"]) == ("a CPU, 4 cores", "cpu", None)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that looks like this one, and is the current folder; the package itself lies in none."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    package = tmp_path / "src" / "minisgl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.jsonl").write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    monkeypatch.delenv("MINISGL_COMMIT", raising=False)
    monkeypatch.setattr(record, "__file__", "/nowhere/minisgl/profiling/record.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commit_id_marks_files_that_differ(checkout: Path) -> None:
    clean = commit_id()
    assert clean is not None and len(clean) == 12
    (checkout / "results" / "old.jsonl").write_text("a line\n")
    assert commit_id() == clean + "+"
    assert commit_id(but="results") == clean
    (checkout / "src" / "minisgl" / "__init__.py").write_text("a = 1\n")
    assert commit_id(but="results") == clean + "+"


def test_commit_id_of_another_project_is_not_taken(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "src" / "minisgl" / "__init__.py").unlink()
    assert commit_id() is None
    monkeypatch.setenv("MINISGL_COMMIT", "abc")
    assert commit_id() == "abc"
