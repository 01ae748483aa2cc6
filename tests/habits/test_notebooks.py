"""Every notebook in examples/ runs from a copy in an empty folder, quickly, and shows what its text says."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
MOST_SECONDS = 120


class Ran:
    """A notebook behind its run."""

    def __init__(self, notebook: Any) -> None:
        self.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        outputs = [output for cell in self.cells for output in cell.outputs]
        self.text = "".join(output.text for output in outputs if output.get("name") == "stdout")
        self.pictures = sum("image/png" in output.get("data", {}) for output in outputs)

    def found(self, pattern: str) -> re.Match[str]:
        match = re.search(pattern, self.text)
        assert match is not None, f"{pattern!r} is not in the output:\n{self.text}"
        return match

    def output_of(self, source: str) -> str:
        """What the one cell printed whose code has this in it."""
        (cell,) = [cell for cell in self.cells if source in cell.source]
        return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def run(name: str, folder: Path) -> Ran:
    for path in (*EXAMPLES.glob("*.ipynb"), *EXAMPLES.glob("*.py")):
        shutil.copy(path, folder)
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    started = time.monotonic()
    NotebookClient(notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    assert time.monotonic() - started < MOST_SECONDS
    return Ran(notebook)


def generate(ran: Ran) -> None:
    assert ran.output_of("do_sample=False)\nprint").startswith("Elizabeth was")
    assert len(ran.output_of("num_return_sequences=2").split("\n---\n")) == 3
    assert ran.output_of("TextStreamer(tokenizer))").startswith("Elizabeth was")
    assert ran.output_of("padding=True").count("---") == 3
    tokens, passes = map(int, ran.found(r"(\d+) tokens in (\d+) passes").groups())
    assert tokens > passes
    ran.found("completion_tokens")


def finetune_lora(ran: Ran) -> None:
    first, last = map(float, ran.found(r"loss ([\d.]+) at first, ([\d.]+) at last").groups())
    assert last < 0.1 * first
    learned = "The lighthouse of Brannoch has seven lamps and a green door."
    assert learned not in ran.output_of("before = write(model)")
    assert ran.output_of("after = write").strip() == learned
    assert ran.output_of("merged = ").strip() == learned
    ran.found("the same logits")
    ran.found(r"\d+ modules, 6 stacks of experts")
    ran.found(r"trainable params: [\d,]+ ")
    assert ran.pictures == 1


def look_inside(ran: Ran) -> None:
    ran.found(r"model\.layers\.0\.mixer\.hook_dt\n")
    ran.found(r"largest difference \d\.\de-0[5-9]")
    ran.found(r"\[2\] of \d+ experts per token")
    start, end = map(float, ran.found(r"loss ([\d.]+) from zero, ([\d.]+) from the learned states").groups())
    assert end < 0.5 * start
    assert ran.pictures == 5


def new_block(ran: Ran) -> None:
    ran.found(r"\['mamba', 'average', 'attention', 'moe'\] Average")
    first, last = map(float, ran.found(r"loss ([\d.]+) at first, ([\d.]+) at last").groups())
    assert first > 4  # log(128) is 4.85
    assert last < 0.05
    assert ran.output_of("written = ").strip() == "A block type of your own takes a module, a cache layer and one call."
    ran.found("the same logits")
    assert ran.pictures == 1


CHECKS: dict[str, Callable[[Ran], None]] = {
    check.__name__: check for check in (generate, finetune_lora, look_inside, new_block)
}


def test_every_notebook_is_checked() -> None:
    assert sorted(CHECKS) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_and_shows_what_it_says(name: str, tmp_path: Path) -> None:
    ran = run(name, tmp_path)
    assert [cell.execution_count for cell in ran.cells] == list(range(1, len(ran.cells) + 1))
    CHECKS[name](ran)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_kept_without_outputs(name: str) -> None:
    text = (EXAMPLES / f"{name}.ipynb").read_text()
    notebook = json.loads(text)
    nbformat.validate(nbformat.from_dict(notebook))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert len(text) < 20_000
