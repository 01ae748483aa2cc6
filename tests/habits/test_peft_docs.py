"""docs/adapters.md is true: its Python and its commands run, in their order, in an empty directory."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from peft_cases import logits

from nemotron_h import NemotronHForCausalLM, cli, demo_model, load_adapter

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_its_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, names)
    assert {directory.name for directory in tmp_path.iterdir()} == {"my-adapter", "my-model", "for-vllm"}
    assert [len(result.token_ids) for result in names["results"]] == [8, 8]
    adapted = load_adapter(NemotronHForCausalLM.from_pretrained(demo_model()).float(), "my-adapter")
    merged = NemotronHForCausalLM.from_pretrained("my-model").float()
    assert float((logits(adapted) - logits(merged)).abs().max()) < 0.1  # the weights that were saved are bfloat16
    assert merged.config.tie_word_embeddings, "lora_targets leaves a tied head alone"
    commands = [shlex.split(line) for line in "".join(blocks("bash")).splitlines()]
    assert len(commands) == 2
    for program, *arguments in commands:
        assert program == "nemotron-h"
        assert cli.main(arguments) == 0
        assert len(capsys.readouterr().out) > 10
