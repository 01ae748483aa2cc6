"""Small checkpoints, and the command line in this process."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import draw_weights, tiny_model
from nemotron_h import demo
from nemotron_h.cli import main

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which must be exactly one line of strict JSON."""
        assert self.out.count("\n") == 1
        assert self.out.endswith("\n")
        return json.loads(self.out, parse_constant=pytest.fail)

    @property
    def error(self) -> str:
        """The last line on stderr, which must be the error, and the only one."""
        *before, last = self.err.splitlines()
        assert last.startswith("error: ")
        assert not any(line.startswith(("error:", "Traceback")) for line in before)
        return last


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`run("info", "nemotron-h-8b")`: the command's outcome."""

    def run_command(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(status, out, err)

    return run_command


def shipped_tokens() -> int:
    """Entries of the shipped vocabulary."""
    tokenizer = json.loads((demo.demo_model() / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    return max(ids) + 1


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with all four block types, an MTP head, the shipped tokenizer and its chat template."""
    directory = tmp_path_factory.mktemp("talker")
    model = tiny_model(vocab_size=shipped_tokens(), num_nextn_predict_layers=1, max_position_embeddings=512)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(demo.demo_model() / name, directory)
    return directory


@pytest.fixture(scope="session")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without a tokenizer, whose time steps lie below transformers' floor."""
    directory = tmp_path_factory.mktemp("mute")
    draw_weights(tiny_model(), dt_bias=-9.0).save_pretrained(directory)
    return directory
