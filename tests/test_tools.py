"""The tools behind `make check` fail on what they are there to catch."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


budget, readme_tree = tool("budget"), tool("readme_tree")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def function(lines: int) -> str:
    return "def f():\n" + "    pass\n" * (lines - 1)


def test_budget_allows_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"src/a.py": "x = 1\n" * 720 + function(80), "csrc/k.cpp": "//\n" * 800})
    assert budget.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "800  src/a.py" in out
    assert "80  src/a.py:721 f" in out
    assert "1600" not in out.split("longest")[0]  # one total per folder


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("src/deep/er/a.py", "x = 1\n" * 801, "src/deep/er/a.py has 801 lines"),
        ("csrc/kernels/k.cpp", "//\n" * 801, "csrc/kernels/k.cpp has 801 lines"),
        ("tests/test_a.py", function(81), "tests/test_a.py:1 f has 81 lines"),
        (
            "tools/t.py",
            "class A:\n" + function(81).replace("    pass", "      pass").replace("def", "  def"),
            "f has 81",
        ),
        ("examples/e.py", "@decorated\n" + function(80), "f has 81"),
    ],
)
def test_budget_fails_past_the_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, complaint: str
) -> None:
    assert budget.main([str(write(tmp_path, {name: text}))]) == 1
    assert complaint in capsys.readouterr().err


README = """# Project
```sh
make demo && nemotron-h generate "Once"
```
```text
README.md            this page
.ci/                 what CI runs
csrc/                kernels,
                     in C++
  kernels/           one file per op
src/nemotron_h/      the package
  errors.py
  ops/
```
Run `make test`, or make sure that `nemotron-h info` works.
"""
FILES = (
    "README.md",
    ".gitignore",
    ".ci/run",
    "csrc/kernels/a.cpp",
    "src/nemotron_h/errors.py",
    "src/nemotron_h/ops/a.py",
)


def known(*files: str) -> set[str]:
    return set(files) | {f"{p.as_posix()}/" for name in files for p in Path(name).parents if p.name}


def test_readme_tree_is_read_in_full() -> None:
    paths = ["README.md", ".ci/", "csrc/", "csrc/kernels/", "src/nemotron_h/"]
    assert readme_tree.tree_paths(README) == [*paths, "src/nemotron_h/errors.py", "src/nemotron_h/ops/"]
    assert readme_tree.check_tree(README, known(*FILES)) == []


def test_readme_tree_finds_what_is_missing_on_either_side() -> None:
    without_errors = readme_tree.check_tree(README, known(*(name for name in FILES if "errors" not in name)))
    assert without_errors == ["the tree names src/nemotron_h/errors.py, which does not exist"]
    more = readme_tree.check_tree(README, known(*FILES, "Makefile", "docs/log.md", "src/nemotron_h/cli/a.py"))
    assert more == [f"the tree does not name {name}" for name in ("Makefile", "docs/", "src/nemotron_h/cli/")]
    assert readme_tree.check_tree("# Nothing", known(*FILES)) == [
        "no fenced `text` block with a line for src/nemotron_h/"
    ]


def test_readme_commands_exist() -> None:
    makefile = "VENV := x\n.PHONY: demo\ndemo: a\n\tmake-nothing\ntest:\n"
    assert readme_tree.check_commands(README, makefile, {"generate", "info"}) == []
    assert readme_tree.check_commands(README, "test:\n", {"info"}) == [
        "`make demo` is no target of the Makefile",
        "`nemotron-h generate` is no command",
    ]


def test_readme_tree_knows_what_git_tracks_or_would_add(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "*.log\n", "a/b.py": "", "a/c.log": "", "logs/d.log": "", "gone.py": ""})
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "gone.py"], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    assert readme_tree.tracked(tmp_path) == {".gitignore", "a/", "a/b.py"}


IMPORTS = {
    "clean": ("", "", True),
    "direct": ("from houseprobe.ops.norm.reference import f\n", "", False),
    "by way of another module": ("import houseprobe.ops.dispatch\n", "import houseprobe.ops.norm.reference\n", False),
    "of the own package": ("from houseprobe.ops import norm\n", "", False),
    "upwards": ("import houseprobe.modeling\n", "", False),
    "without a layer": ("import houseprobe.stray\n", "", False),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_the_import_contracts_bite(tmp_path: Path, case: str) -> None:
    native, dispatch, kept = IMPORTS[case]
    package = "houseprobe/ops/norm"
    write(tmp_path, {f"{package}/native.py": native, f"{package}/reference.py": "def f(): ...\n"})
    write(tmp_path, {f"{package}/__init__.py": "from houseprobe.ops.norm import reference\n"})
    write(
        tmp_path, {"houseprobe/ops/__init__.py": "", "houseprobe/ops/dispatch.py": dispatch, "houseprobe/errors.py": ""}
    )
    write(tmp_path, {"houseprobe/__init__.py": "", "houseprobe/modeling.py": ""})
    write(tmp_path, {f"{package}/cuda.py": "", f"{package}/grouped.py": ""})
    if "stray" in native:
        write(tmp_path, {"houseprobe/stray.py": ""})
    contracts = re.search(
        r"^\[tool\.importlinter\]\n.*", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    assert contracts is not None
    # Layers that the probe leaves out must be optional there; the real package has them all.
    layers = re.sub(r'^    "\(?(\w+)\)?",', r'    "(\1)",', contracts[0], flags=re.MULTILINE)
    (tmp_path / "pyproject.toml").write_text(layers.replace("nemotron_h", "houseprobe"))
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode == 0) == kept, run.stdout + run.stderr
    assert "Contracts:" in run.stdout


def test_parity_is_within_the_bound() -> None:
    """README's first figures: the tool runs, and what it prints is below the bound that they are held to."""
    command = [sys.executable, str(ROOT / "tools" / "parity.py"), "--configurations", "4", "--tokens", "20"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    single, double = (float(figure) for figure in re.findall(r"float(?:32|64) (\S+?)[, ]", printed + " "))
    assert 0 < double < 1e-10 < single < 2e-4


def test_the_compatibility_table_has_every_habit_and_no_failure() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`tests/" in line]
    listed = {file for row in rows for file in re.findall(r"`(tests/[^`]+)`", row)}
    habits = {str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "habits").glob("test_*.py")}
    assert habits <= listed
    assert all((ROOT / file).exists() for file in listed)
    (promised,) = re.findall(r'"transformers>=([\d.]+),<', (ROOT / "pyproject.toml").read_text())
    header = next(line for line in page.splitlines() if line.startswith("| habit"))
    assert f"transformers {promised}." in header
    for row in rows:
        results = [cell.strip() for cell in row.strip("|").split("|")][2:]
        assert len(results) == header.count("transformers "), row
        assert all(re.fullmatch(r"\d+ passed", result) for result in results), row
