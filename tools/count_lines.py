"""Counts the engine's lines of code and holds the budget: it is meant to be read in an afternoon.

Counted are Python, C++ and CUDA under `src/minisgl` and `csrc`, without blank lines, comments and docstrings;
`profiling/`, `cli/` and static files lie outside the budget. Exit code 1 if there is more than `BUDGET`.
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

BUDGET = 7000
ROOT = Path(__file__).resolve().parent.parent
COUNTED = ("src/minisgl", "csrc")
OUTSIDE = frozenset({"cli", "profiling", "static"})  # names of folders
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


def count_packages(root: Path) -> tuple[Counter[str], Counter[str]]:
    """Lines by package, those within the budget and those outside it."""
    within: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for top in COUNTED:
        for path in sorted((root / top).rglob("*")):
            if path.suffix not in PYTHON | C_LIKE:
                continue
            folders = path.relative_to(root / top).parts[:-1]
            package = "/".join((top, *folders[:1]))
            (outside if OUTSIDE.intersection(folders) else within)[package] += count_file(path)
    return within, outside


def main() -> int:
    within, outside = count_packages(ROOT)
    for package, lines in sorted(within.items()):
        print(f"{lines:7,}  {package}")
    total = sum(within.values())
    print(f"{total:7,}  of {BUDGET:,} lines of code")
    print(f"{sum(outside.values()):7,}  outside the budget: {', '.join(sorted(outside)) or 'nothing'}")
    if total > BUDGET:
        print(f"over the budget by {total - BUDGET:,} lines: delete, merge, or make a case for a larger one")
    return int(total > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
