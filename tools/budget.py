#!/usr/bin/env python3
"""Print the longest files and functions; fail past 800 lines a file or 80 lines a function.

    tools/budget.py [ROOT]

Files under 500 lines are the rule and the table shows who bends it; only the hard limits fail. A Python function is
measured from its first decorator to its last line, docstring included; C++ is measured by file.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("src", "csrc", "tests", "tools", "examples")
SUFFIXES = (".py", ".cpp", ".h")
MAX_FILE = 800
MAX_FUNCTION = 80
SHOWN = 12


class Length(NamedTuple):
    lines: int
    name: str  # path, or path:line function


def sources(root: Path) -> list[Path]:
    """Every source file below the folders, hidden folders left out."""
    found = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


def measure(root: Path) -> tuple[list[Length], list[Length]]:
    """(files, functions), longest first."""
    files, functions = [], []
    for path in sources(root):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        files.append(Length(len(text.splitlines()), name))
        if path.suffix == ".py":
            functions += _functions(name, ast.parse(text, name))
    return sorted(files, reverse=True), sorted(functions, reverse=True)


def _functions(name: str, tree: ast.Module) -> Iterator[Length]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            last = node.end_lineno or node.lineno
            yield Length(last - first + 1, f"{name}:{node.lineno} {node.name}")


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    files, functions = measure(root)
    for folder in FOLDERS:
        own = [f.lines for f in files if f.name.startswith(f"{folder}/")]
        print(f"{sum(own):7d} lines in {len(own):3d} files  {folder}/")
    for title, lengths, limit in (("files", files, MAX_FILE), ("functions", functions, MAX_FUNCTION)):
        print(f"\nlongest {title} (limit {limit})")
        for length in lengths[:SHOWN]:
            print(f"{length.lines:7d}  {length.name}")
    over = [f for f in files if f.lines > MAX_FILE] + [f for f in functions if f.lines > MAX_FUNCTION]
    for length in over:
        print(f"too long: {length.name} has {length.lines} lines; split it", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
