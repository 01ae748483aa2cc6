"""Run the tests of each habit against several versions of transformers and write the table of docs/compatibility.md.

    python tools/compatibility.py 5.20.0 5.23.0

Each version is installed without its dependencies into a directory of its own, build/transformers-<version>, which
stands first on the path; everything else is the environment that runs this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: tools/compatibility.py -->", "<!-- end of table -->"
OTHERS = ("torch", "peft", "trl", "accelerate", "datasets", "lm_eval", "huggingface_hub", "safetensors", "tokenizers")


def habits() -> dict[str, list[str]]:
    """Row of the table to test files; the rows are in docs/compatibility.md itself, every habit test is in one."""
    rows = re.findall(r"^\| ([^|]+) \| `(tests/[^|]+)` \|", DOC.read_text(), re.MULTILINE)
    return {name: files.replace("`", "").split(", ") for name, files in rows}


def install(release: str) -> Path:
    target = ROOT / "build" / f"transformers-{release}"
    if not (target / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        subprocess.run([*command, f"transformers=={release}"], check=True)
    return target


def outcome(files: list[str], path: Path) -> str:
    """`23 passed`, or what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--show-capture=no", *files]
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts = re.findall(r"(\d+ (?:passed|failed|errors?|skipped))", done.stdout.strip().splitlines()[-1])
    return ", ".join(counts) or f"exit {done.returncode}"


def main(releases: list[str]) -> int:
    found: dict[str, dict[str, str]] = {release: {} for release in releases}
    for release in releases:
        path = install(release)
        for name, files in habits().items():
            found[release][name] = outcome(files, path)
            print(f"transformers {release}: {name}: {found[release][name]}", file=sys.stderr, flush=True)
    lines = ["| habit | tests | " + " | ".join(f"transformers {release}" for release in releases) + " |"]
    lines.append("|---" * (len(releases) + 2) + "|")
    for name, files in habits().items():
        shown = ", ".join(f"`{file}`" for file in files)
        lines.append(f"| {name} | {shown} | " + " | ".join(found[release][name] for release in releases) + " |")
    text = DOC.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    beside = ", ".join(f"{name} {version(name)}" for name in OTHERS)
    DOC.write_text(text[:start] + "\n" + "\n".join(lines) + f"\n\nBeside it: {beside}.\n" + text[end:])
    results = [result for by_habit in found.values() for result in by_habit.values()]
    return int(any(word in result for result in results for word in ("failed", "error", "exit")))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
