"""README.md is true: its Python runs, its commands exist, its limits are the shipped model's."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return code


def test_its_python_runs() -> None:
    done = subprocess.run([sys.executable, "-c", python()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    prompt = "Hey, are you conscious? Can you talk to me?"
    assert done.stdout.startswith(prompt)
    assert len(done.stdout.strip()) > len(prompt) + 10


def test_its_python_is_five_lines_and_imports() -> None:
    lines = [line for line in python().splitlines() if line.strip()]
    assert len([line for line in lines if " import " not in line]) == 5


def test_its_python_is_the_example_of_transformers_documentation() -> None:
    """The same calls with the same arguments; the shipped model stands for the page's hub id."""
    page = (ROOT / "tests/data/seed_example.txt").read_text()
    for call in ("from_pretrained(", "generate(inputs.input_ids, max_length=30)", 'return_tensors="pt"'):
        assert call in page
        assert call in python()
    (prompt,) = re.findall(r'prompt = "(.*)"', page)
    (decode,) = re.findall(r"(tokenizer\.batch_decode\(.*\))\[0\]", page)
    assert prompt in python()
    assert decode in python()


def test_oldest_transformers_is_the_one_that_is_promised() -> None:
    (tested,) = re.findall(r"^OLDEST := transformers==(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (promised,) = re.findall(r'"transformers>=([\d.]+),<', (ROOT / "pyproject.toml").read_text())
    assert tested.split(".")[:2] == promised.split(".")
    assert "make oldest" in (ROOT / ".ci/run").read_text()


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
