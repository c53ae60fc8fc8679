"""The documents name things that exist, and the examples in them run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minisgl.cli.options import ENGINE_OPTIONS, SERVER_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE_FOLDERS = ("src", "csrc", "tests", "tools")
TOUR, ENVIRONMENT = ROOT / "docs" / "tour.md", ROOT / "docs" / "env.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", [TOUR, ROOT / "docs" / "models.md"], ids=lambda path: path.name)
def test_files_and_names_exist(document: Path) -> None:
    code = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    terms = set(re.findall(r"`([\w./]+)`", code))
    files = {term for term in terms if re.search(r"\.(py|cpp|hpp)$", term)}
    assert files, "the page names no file: the pattern is wrong"
    assert [f for f in files if not ((ROOT / f).exists() or (ROOT / "src" / "minisgl" / f).exists())] == []

    known = _identifiers()
    names = {part for term in terms - files if "/" not in term for part in term.split(".") if part.isidentifier()}
    assert names - known == set()


def _identifiers() -> set[str]:
    files = (path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp"))
    return {word for path in files for word in re.findall(r"\w+", path.read_text())}


def test_every_option_and_variable_is_documented() -> None:
    text = ENVIRONMENT.read_text()
    wanted = {option.flag for option in (*ENGINE_OPTIONS.values(), *SERVER_OPTIONS.values())}
    for path in (*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        wanted |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text()))
    assert {"--model", "MINISGL_CACHE"} <= wanted
    assert {name for name in wanted if f"`{name}`" not in text} == set()


def test_offline_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (example,) = [block for block in blocks if "from minisgl import" in block]
    exec(compile(example, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out
