"""docs/training.md is true: its Python runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from nemotron_h import NemotronHForCausalLM

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
TRAINER, TRL = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(example: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(directory)
    names: dict[str, Any] = {"__name__": "page"}
    exec(example, names)
    return names


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(TRAINER, tmp_path, monkeypatch)
    assert type(names["model"]) is NemotronHForCausalLM
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors").exists()
    assert all(bool(bias.any()) for bias in names["model"].buffers())


def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(TRL, tmp_path, monkeypatch)
    assert type(names["trainer"].model) is NemotronHForCausalLM
    assert names["trainer"].state.global_step == 1
