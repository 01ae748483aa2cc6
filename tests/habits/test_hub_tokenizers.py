"""The tokenizer of a repository: none only if the hub says so, an error if nobody can tell."""

import shutil
from pathlib import Path

import pytest
from hub_stand_in import Worker, running_hub

from helpers import tiny_model
from nemotron_h import demo_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
IS_NONE = "result = LLM({!r}).tokenizer is None"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bare")
    tiny_model(hybrid_override_pattern="M", hidden_size=8, vocab_size=2048).save_pretrained(directory)
    return directory


def test_none_unknown_and_damaged_are_told_apart(bare: Path, tmp_path: Path) -> None:
    whole, damaged = (Path(shutil.copytree(bare, tmp_path / name)) for name in ("whole", "damaged"))
    for file in TOKENIZER:
        shutil.copy(demo_model() / file, whole)
        shutil.copy(demo_model() / file, damaged)
    (damaged / "tokenizer.json").write_text("{")
    with running_hub() as hub:
        for name, directory in {"bare": bare, "whole": whole, "damaged": damaged, "half": whole}.items():
            hub.add(f"me/{name}", directory)
        worker = Worker(tmp_path / "home", hub.url)
        assert worker.result(IS_NONE.format("me/bare")) is True
        assert worker.result(IS_NONE.format("me/whole")) is False
        answer = worker.ask("LLM('me/damaged')")
        assert answer["error"][0] == "CheckpointError"
        assert "tokenizer" in answer["message"]
        worker.result("NemotronHForCausalLM.from_pretrained('me/half'); result = 1")
        hub.repositories["me/half"].gated = True  # the weights are in the cache by now, the tokenizer is not
        answer = worker.ask("LLM('me/half')")
        assert answer["error"][0] == "ModelNotFoundError"
        assert answer["message"].startswith("me/half: tokenizer.json")
        assert "\n" not in answer["message"]
        worker.close()
    offline = Worker(tmp_path / "home", hub.url, HF_HUB_OFFLINE="1")
    assert offline.result(IS_NONE.format("me/bare")) is True
    assert offline.result(IS_NONE.format("me/whole")) is False
    answer = offline.ask("LLM('me/half')")
    assert answer["error"][0] == "ModelNotFoundError"
    assert answer["message"].startswith("me/half: tokenizer.json is not in the cache")
    assert answer["events"] == []
    offline.close()
