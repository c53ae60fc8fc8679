from __future__ import annotations

import ast
from pathlib import Path

import pytest

import check_imports
import count_lines

PYTHON = '''"""Docstring
of two lines."""

# comment
import os  # counted once


def f(x: int) -> str:
    """Docstring."""
    text = """a string, and
# no comment
no docstring"""
    return text


class A:
    """Docstring."""

    b = (
        1,  # one

    )
    "a string that stands alone is code unless it comes first"
'''


def test_count_python_leaves_out_blanks_comments_and_docstrings() -> None:
    assert count_lines.count_python(PYTHON) == 11


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("", 0),
        ("int a; // comment\n\n// comment\nint b;\n", 2),
        ("/* over\n two lines */ int a;\n/* alone */\n", 1),
        ("int a; /* begins\n here */\n", 1),
        ('auto url = "http://x"; /* 1 */\nauto s = "/*";\nint b; // "\n', 3),
        ("char a = '\"'; // it's\nchar b = '/'; // '\"\nint c;\n", 3),
        ("int big = 1'000'000; // a 'separator\nint b;\n", 2),
        ('auto s = R"x(\n// in a raw string\n)x";\n// not\n', 3),
        ("// goes on \\\nover the end\nint a;\n", 1),
    ],
)
def test_count_c_like_leaves_out_blanks_and_comments(source: str, lines: int) -> None:
    assert count_lines.count_c_like(source) == lines


def _tree(root: Path, engine_lines: int) -> None:
    for name, lines in {
        "src/minisgl/types.py": 3,
        "src/minisgl/engine/engine.py": engine_lines,
        "src/minisgl/cli/main.py": 5000,
        "src/minisgl/server/static/chart.py": 5000,
        "src/minisgl/kernels/store/store.cu": 4,
        "src/minisgl/kernels/store/cases.py": 5000,
        "src/minisgl/kernels/store/ladder/store_v1.cu": 5000,
        "src/minisgl/attention/base.py": 2,
        "src/minisgl/attention/triton_decode.py": 6,
        "csrc/radix/tree.cpp": 5,
        "csrc/README.md": 9,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a = 1;\n" * lines)


def test_count_packages_sums_by_budget_and_package(tmp_path: Path) -> None:
    _tree(tmp_path, engine_lines=7)
    counts = count_lines.count_packages(tmp_path)
    assert counts["engine"] == {"src/minisgl": 3, "src/minisgl/engine": 7, "src/minisgl/attention": 2}
    assert counts["kernels"] == {"src/minisgl/kernels": 4, "src/minisgl/attention": 6, "csrc/radix": 5}
    assert counts[""] == {"src/minisgl/cli": 5000, "src/minisgl/server": 5000, "src/minisgl/kernels": 10000}


@pytest.mark.parametrize(("engine", "code"), [(6995, 0), (6996, 1)])
def test_main_fails_above_a_budget(
    engine: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(count_lines.BUDGETS, "engine", 7000)
    _tree(tmp_path, engine_lines=engine)
    monkeypatch.setattr(count_lines, "ROOT", tmp_path)
    assert count_lines.main() == code
    assert ("over the budget by 1 lines" in capsys.readouterr().out) == bool(code)


def test_main_holds_the_kernels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(count_lines.BUDGETS, "kernels", 14)
    _tree(tmp_path, engine_lines=1)
    monkeypatch.setattr(count_lines, "ROOT", tmp_path)
    assert count_lines.main() == 1


def test_nothing_that_counts_imports_the_laboratory_of_a_kernel() -> None:
    """What the budget leaves out as the laboratory's must be just that. The registry's lazy loader is the one door."""
    root, found = count_lines.ROOT / "src", []
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        if count_lines.part_of(path.relative_to(count_lines.ROOT)):
            imports = check_imports.find_imports(ast.parse(path.read_text()), module, path.name == "__init__.py")
            found += [f"{module}: {i.module}" for i in imports if {"cases", "ladder"} & set(i.module.split("."))]
    assert found == []
    assert count_lines.part_of(Path("src/minisgl/kernels/spec.py")) == "kernels"
    assert count_lines.part_of(Path("src/minisgl/engine/cases.py")) == "engine"
