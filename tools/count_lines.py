"""Counts lines of code and holds two budgets: the engine is meant to be read in an afternoon, the kernels in another.

Counted are Python, C++ and CUDA under `src/minisgl` and `csrc`, without blank lines, comments and docstrings. Kernels
are what runs inside an operator: `kernels/`, `csrc/` and the attention that is written in Triton; every version that
the engine may run counts. The engine is all the rest. Outside lie `profiling/`, `cli/`, static files, `csrc/debug/`,
which tests and debugging alone call, and what only tests and the laboratory load of a kernel: its `cases.py`
(reference, inputs, sizes) and `ladder/` (versions that the engine doesn't run). A test holds that nothing that counts
imports those. Exit code 1 if either is over.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

BUDGETS = {"engine": 7000, "kernels": 4000}
ROOT = Path(__file__).resolve().parent.parent
COUNTED = ("src/minisgl", "csrc")
OUTSIDE = frozenset({"cli", "debug", "profiling", "static"})  # names of folders
LABORATORY = re.compile(r"kernels/\w+/(cases\.py|ladder/.*)$")  # of a kernel's folder, what the engine never loads
PYTHON = frozenset({".py", ".pyi"})
C_LIKE = frozenset({".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".inl"})

_LAYOUT = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT})
# A literal is matched before a comment can begin inside it; a raw string ends only at its own delimiter.
_C_TOKEN = re.compile(
    r'(?P<code>R"(?P<tag>[^(\s]*)\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"|(?<![0-9A-Fa-f])\'(?:\\.|[^\'\\\n])+\')'
    r"|(?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)",
    re.DOTALL,
)


def count_python(source: str) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines.difference(*_docstrings(ast.parse(source))))


def _docstrings(tree: ast.AST) -> Iterator[range]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            yield range(first.lineno, (first.end_lineno or first.lineno) + 1)


def count_c_like(source: str) -> int:
    """Lines of C, C++ or CUDA that hold code: not blank, no comment."""

    def without_comment(match: re.Match[str]) -> str:
        return match["code"] or "\n" * match["comment"].count("\n")

    return sum(1 for line in _C_TOKEN.sub(without_comment, source).splitlines() if line.strip())


def count_file(path: Path) -> int:
    source = path.read_text(encoding="utf-8")
    return count_python(source) if path.suffix in PYTHON else count_c_like(source)


def part_of(path: Path) -> str:
    """The budget that the file at `path`, relative to the root, counts towards; empty: none."""
    if OUTSIDE.intersection(path.parts[:-1]) or LABORATORY.search(path.as_posix()):
        return ""
    return (
        "kernels" if path.parts[0] == "csrc" or "kernels" in path.parts or path.name.startswith("triton_") else "engine"
    )


def count_packages(root: Path) -> dict[str, Counter[str]]:
    """Lines by package, for each budget and, under the empty name, for what lies outside of both."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("", *BUDGETS)}
    for top in COUNTED:
        for path in sorted((root / top).rglob("*")):
            if path.suffix in PYTHON | C_LIKE:
                package = "/".join((top, *path.relative_to(root / top).parts[:-1][:1]))
                counts[part_of(path.relative_to(root))][package] += count_file(path)
    return counts


def main() -> int:
    counts, over = count_packages(ROOT), False
    for name, budget in BUDGETS.items():
        for package, lines in sorted(counts[name].items()):
            print(f"{lines:7,}  {package}")
        total = sum(counts[name].values())
        print(f"{total:7,}  of {budget:,} lines: {name}")
        if total > budget:
            over = True
            print(f"over the budget by {total - budget:,} lines: delete, merge, or make a case for a larger one")
    print(f"{sum(counts[''].values()):7,}  outside: {', '.join(sorted(counts[''])) or 'nothing'}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
