"""docs/adapters.md is true: its Python and its commands run, in their order, in an empty directory."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from peft_cases import written_out

from nemotron_h import NemotronHForCausalLM, cli, demo_model, load_adapter, lora_targets

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def assert_merged(merged: NemotronHForCausalLM) -> None:
    """Every weight is `W + s·B·A`: rounded to bfloat16 once as a product and once as a sum, as they were computed.

    Weights, not logits: where a router's choice is nearly a tie, a rounding moves logits as far as an adapter does.
    """
    base = NemotronHForCausalLM.from_pretrained(demo_model())
    exact = written_out(load_adapter(copy.deepcopy(base).float(), "my-adapter"))
    found, before = merged.state_dict(), base.state_dict()
    assert exact.keys() == found.keys()
    changed = 0
    for name, wanted in exact.items():
        change = wanted - before[name].float()
        error = found[name].float() - wanted
        assert bool((error.abs() <= 1.01 * 2**-8 * (wanted.abs() + change.abs())).all()), name
        assert error.norm() <= change.norm() / 4, name
        changed += bool(change.any())
    assert changed == sum(map(len, lora_targets(base).values()))


def test_its_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, names)
    assert {directory.name for directory in tmp_path.iterdir()} == {"my-adapter", "my-model", "for-vllm"}
    assert [len(result.token_ids) for result in names["results"]] == [8, 8]
    merged = NemotronHForCausalLM.from_pretrained("my-model")
    assert_merged(merged)
    assert merged.config.tie_word_embeddings, "lora_targets leaves a tied head alone"
    commands = [shlex.split(line) for line in "".join(blocks("bash")).splitlines()]
    assert len(commands) == 2
    for program, *arguments in commands:
        assert program == "nemotron-h"
        assert cli.main(arguments) == 0
        written = capsys.readouterr()
        assert written.out, "a random adapter's text may be short, but there is one"
        assert "decode" in written.err
