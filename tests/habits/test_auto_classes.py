"""`register()` and what stands behind it: Auto classes, pipelines, adapters with `backbone.` in their keys."""

import json
from pathlib import Path
from typing import Any

import pytest

import fresh
from helpers import tiny_model
from nemotron_h import LLM, SamplingParams, demo_model


def case(name: str, directory: Path) -> Any:
    done = fresh.python(Path(__file__).parent / "auto_cases.py", name, str(directory))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_auto_classes(directory: Path) -> None:
    found = case("auto", directory)
    assert found["before"] == "transformers.NemotronHForCausalLM"
    ours = ["NemotronHConfig", "NemotronHModel", "NemotronHForCausalLM", "NemotronHForCausalLM", "NemotronHConfig"]
    assert found["found"] == [[f"nemotron_h.{name}" for name in ours]] * 3
    assert found["theirs"] == "transformers.NemotronHForCausalLM", "an explicit import stays transformers'"
    assert found["same"]
    assert found["names"], "what is written does not depend on register()"


def test_adapters_that_say_backbone(directory: Path) -> None:
    before, after = case("backbone", directory)
    assert before["effect"] == 0
    assert after["effect"] > 0.1
    assert after["off"] < 1e-5


def test_adapters_on_every_target_after_register(directory: Path) -> None:
    assert max(case("adapters", directory)) < 1e-5


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return case("texts", tmp_path_factory.mktemp("empty"))


def test_pipeline_with_texts(texts: Any) -> None:
    llm = LLM(demo_model(), dtype="float32")
    written = llm.generate("Elizabeth", SamplingParams(max_tokens=12, temperature=0, ignore_eos=False))[0].text
    assert texts["model"] == "nemotron_h.NemotronHForCausalLM"
    assert texts["one"] == "Elizabeth" + written
    assert texts["new only"] == written
    assert texts["batch"] == texts["alone"], "left padding changes nothing"
    assert texts["samples"] == 3
    assert texts["stopped"] == texts["one"][: len(texts["stopped"])]
    assert len(texts["stopped"]) < len(texts["one"])


def test_pipeline_with_chat_messages(texts: Any) -> None:
    user, assistant = texts["chat"]
    assert user == {"role": "user", "content": "What is a horse?"}
    assert assistant["role"] == "assistant"
    assert assistant["content"] == texts["template"]
    assert assistant["content"].startswith("A horse is")


def test_pipeline_with_objects(tmp_path: Path, texts: Any) -> None:
    found = case("objects", tmp_path)
    assert found == {"text": texts["one"], "registered": False}
