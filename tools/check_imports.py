"""Holds the rule that imports point one way. Lazy imports and those under TYPE_CHECKING count.

The package is cut into units: its folders, and the modules that lie directly in it. `MAY_IMPORT` says which other
units each may import, `BANNED` which foreign packages it must not. Exit code 1 and one line a breach.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "minisgl"
ROOT = Path(__file__).resolve().parent.parent / "src" / PACKAGE

_BASE = frozenset({"types", "hardware", "config", "timing", "gguf_file"})
_STORAGE = _BASE | {"cache", "kernels", "distributed"}  # these three don't import one another
_MODELS = _STORAGE | {"attention", "models"}
_ENGINE = _MODELS | {"messages", "engine"}
_SERVER = frozenset({"types", "config", "timing", "messages", "text", "server"})

# A unit may always import itself. "" is the package's own __init__.py: the public names.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "types": frozenset(),
    "hardware": frozenset({"types"}),
    "timing": frozenset({"types"}),
    "gguf_file": frozenset({"types"}),
    "config": frozenset({"types", "hardware"}),
    "messages": frozenset({"types"}),
    "_C": frozenset(),  # the C++ extension
    "cache": _BASE | {"_C"},
    "kernels": _BASE | {"_C"},
    "distributed": _BASE,
    "attention": _STORAGE,
    "models": _STORAGE | {"attention"},
    "text": frozenset({"types", "messages", "gguf_file"}),
    "engine": _MODELS | {"messages"},
    "llm": _ENGINE | {"text"},
    "": frozenset({"types", "llm"}),
    "server": _SERVER,
    "profiling": _ENGINE | {"text", "llm", "_C", ""},
    "cli": _ENGINE | _SERVER | {"llm", "profiling", ""},
    "__main__": frozenset({"cli"}),
}

# By unit or by module, the longest name first; transformers is a test's oracle and no one else's.
EVERYWHERE = frozenset({"transformers"})
BANNED: dict[str, frozenset[str]] = {
    "engine.scheduler": frozenset({"torch"}),
    "messages": frozenset({"torch"}),
    "server": frozenset({"torch"}),
    "text": frozenset({"torch"}),
}
STANDARD_LIBRARY_ONLY = frozenset({"types"})


class Import(NamedTuple):
    """An import found in a source file: dotted name of the module, and where."""

    module: str
    line: int


def find_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[Import]:
    """Every module that the code of `module` may import, wherever in the file the statement stands.

    `from a import b` yields `a.b`: whether b is a module or a name in a doesn't matter to the rule. Calls of
    `import_module` and `__import__` with a literal name count too.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _called(node) in ("import_module", "__import__"):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(first.value, node.lineno)


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def unit_of(module: str) -> str:
    """`minisgl.engine.runner` lies in `engine`; `minisgl`, and a name that it exports, in ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def breach(importer: str, imported: str) -> str | None:
    """Why module `importer` must not import `imported`; None if it may."""
    if imported.split(".")[0] != PACKAGE:
        return _foreign_breach(importer, imported.split(".")[0])
    unit, other = unit_of(importer), unit_of(imported)
    if unit == other or other in MAY_IMPORT[unit]:
        return None
    allowed = ", ".join(sorted(name or PACKAGE for name in MAY_IMPORT[unit])) or "nothing of this package"
    return f"{unit or PACKAGE} must not import {imported}; it may import: {allowed}"


def _foreign_breach(importer: str, top: str) -> str | None:
    name = importer.removeprefix(PACKAGE + ".")
    for rule in (name, name.split(".")[0]):
        if top in BANNED.get(rule, frozenset()):
            return f"{rule} must not import {top}: it has to work, and to be tested, without it"
        if rule in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names:
            return f"{rule} must not import {top}; it may import: the standard library"
    if top in EVERYWHERE:
        return f"nothing here may import {top}; only tests do"
    return None


def check(root: Path) -> Iterator[str]:
    """One message a breach under the package folder `root`: `file:line: what is wrong; what is allowed`."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        parts = [PACKAGE, *relative.with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        if len(relative.parts) > int(is_package) and module.split(".")[1] not in MAY_IMPORT:
            yield f"{path}:1: {module} belongs to no unit; add one to MAY_IMPORT in {Path(__file__).name}"
            continue
        for found in find_imports(ast.parse(path.read_text(encoding="utf-8"), str(path)), module, is_package):
            if reason := breach(module, found.module):
                yield f"{path}:{found.line}: {reason}"


def report(messages: Iterable[str]) -> int:
    """Prints the breaches; returns their number."""
    count = 0
    for message in messages:
        print(message)
        count += 1
    return count


def main() -> int:
    count = report(check(ROOT))
    print(f"imports: {count} point the wrong way" if count else "imports: all point one way")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
