#!/usr/bin/env python3
"""Check that README.md tells the truth about the repository: its annotated tree, its `make` targets, its commands.

    tools/readme_tree.py [ROOT]

The tree is the fenced block (three backticks and `text`) that has a line for `src/nemotron_h/`. Each line is a path,
then two or more spaces and a comment; a deeper indented path lies in the folder above it; any other line continues a
comment:

    csrc/                the C++ kernels
    src/nemotron_h/      the package
      errors.py          its exceptions

Every path must exist, and every top-level entry (hidden files aside) and every folder of the package must have a line.
In code spans and blocks, each `make X` must be a target and each `nemotron-h X` a command of `nemotron_h.cli.COMMANDS`.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = "src/nemotron_h/"


def tracked(root: Path) -> set[str]:
    """Files that git tracks or would add, and all folders that hold one (with a final slash)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    files = {name for name in listed.split("\0") if name and (root / name).exists()}
    folders = {f"{parent.as_posix()}/" for name in files for parent in Path(name).parents if parent.name}
    return files | folders


def tree_paths(readme: str) -> list[str]:
    """The paths of the annotated tree, in full; folders end with a slash. Empty when there is no tree."""
    blocks = re.findall(r"^```text\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    tree = next((block for block in blocks if re.search(rf"^{PACKAGE}(\s|$)", block, re.MULTILINE)), "")
    paths: list[str] = []
    open_folders: list[tuple[int, str]] = []  # (indentation, full path) of the folders that the next line may lie in
    for line in tree.splitlines():
        match = re.fullmatch(r"( *)(\S+)(?:\s{2,}.*)?", line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        while open_folders and open_folders[-1][0] >= indent:
            open_folders.pop()
        path = (open_folders[-1][1] if open_folders else "") + name
        paths.append(path)
        if name.endswith("/"):
            open_folders.append((indent, path))
    return paths


def required(known: set[str]) -> set[str]:
    """What the tree must name: top-level files and folders, and the package's own folders."""
    top = {name for name in known if "/" not in name.rstrip("/")}
    hidden_files = {name for name in top if name.startswith(".") and not name.endswith("/")}
    package_folders = {name for name in known if re.fullmatch(rf"{PACKAGE}[^/]+/", name)}
    return (top - hidden_files) | package_folders


def check_tree(readme: str, known: set[str]) -> list[str]:
    """What is wrong with the tree, one sentence each."""
    paths = tree_paths(readme)
    if not paths:
        return [f"no fenced `text` block with a line for {PACKAGE}"]
    named = set(paths)
    # A line such as src/nemotron_h/ also stands for the folders above it.
    covered = named | {f"{parent.as_posix()}/" for name in named for parent in Path(name).parents if parent.name}
    return [f"the tree names {path}, which does not exist" for path in paths if path not in known] + [
        f"the tree does not name {path}" for path in sorted(required(known) - covered)
    ]


def code(readme: str) -> str:
    """The text of code spans and fenced blocks."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", rest)])


def check_commands(readme: str, makefile: str, commands: set[str]) -> list[str]:
    """`make` targets and `nemotron-h` commands in code that do not exist."""
    text = code(readme)
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    made = set(re.findall(r"\bmake ([a-z][\w-]*)", text))
    called = set(re.findall(r"(?:^|[\s/])nemotron-h ([a-z]\w*)", text, re.MULTILINE))
    return [f"`make {name}` is no target of the Makefile" for name in sorted(made - targets)] + [
        f"`nemotron-h {name}` is no command" for name in sorted(called - commands)
    ]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    commands = set(importlib.import_module("nemotron_h.cli").COMMANDS)
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    problems = check_tree(readme, tracked(root)) + check_commands(readme, makefile, commands)
    for problem in problems:
        print(f"README.md: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
