"""Repositories whose small files lie: refused before anything that they name is asked for."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import Hub, Worker, running_hub

from helpers import tiny_model

INDEX = "model.safetensors.index.json"


def leading_to(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["weight_map"].update({sorted(index["weight_map"])[0]: name})


# What is done to the index, and words of the error.
LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "up": (leading_to("../evil.safetensors"), "must be a plain file name"),
    "other": (leading_to("sub/evil.safetensors"), "must be a plain file name"),
    "absolute": (leading_to("/tmp/evil.safetensors"), "must be a plain file name"),
    "python": (leading_to("evil.py"), "must be a plain file name"),
    "pattern": (leading_to("*.safetensors"), "*.safetensors"),
    "missing": (leading_to("absent.safetensors"), "absent.safetensors"),
    "empty": (lambda index: index.update(weight_map={}), "weight_map must map"),
    "list": (lambda index: index.update(weight_map=["evil.py"]), "weight_map must map"),
    "number": (leading_to(5), "must be the name of a shard, is 5"),  # type: ignore[arg-type]
    "size": (lambda index: index["metadata"].update(total_size=5), "total_size is 5"),
    "bare": (lambda index: index.pop("metadata"), 'no "metadata"'),
    "unlisted": (lambda index: index["weight_map"].popitem(), "is not listed in"),
    "extra": (lambda index: index["weight_map"].update(x="model-00001-of-00002.safetensors"), "tensor 'x' is not in"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    model = tiny_model(hybrid_override_pattern="M*", hidden_size=8)
    model.save_pretrained(directory, max_shard_size=sum(t.nbytes for t in model.state_dict().values()) * 2 // 3)
    assert (directory / "model-00001-of-00002.safetensors").exists()
    return directory


@pytest.fixture(scope="module")
def hub(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("repositories")
    with running_hub() as hub:
        for name, (change, _) in LIES.items():
            directory = Path(shutil.copytree(source, root / name))
            (directory / "sub").mkdir()
            for file in ("evil.py", "sub/evil.safetensors", "evil.safetensors"):
                (directory / file).write_bytes(b"evil")
            index = json.loads((directory / INDEX).read_text())
            change(index)
            (directory / INDEX).write_text(json.dumps(index))
            hub.add(f"lies/{name}", directory)
        for name, file, text in (
            ("broken", INDEX, "{"),
            ("generation", "generation_config.json", "{"),
            ("hot", "generation_config.json", '{"temperature": "hot"}'),
        ):
            directory = Path(shutil.copytree(source, root / name))
            (directory / file).write_text(text)
            hub.add(f"lies/{name}", directory)
        hub.add("lies/none", source)
        yield hub


@pytest.fixture(scope="module")
def worker(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("home"), hub.url)
    yield worker
    worker.close()


def refusal(worker: Worker, hub: Hub, name: str) -> str:
    hub.requests.clear()
    text = ""
    for cls in ("NemotronHForCausalLM", "NemotronHModel", "AutoModelForCausalLM"):
        answer = worker.ask(f"{cls}.from_pretrained('lies/{name}')")
        assert "CheckpointError" in answer["error"], answer["message"]
        assert "\n" not in answer["message"]
        text = answer["message"]
    return text


def test_the_truthful_repository_loads(worker: Worker) -> None:
    assert worker.result("result = type(AutoModelForCausalLM.from_pretrained('lies/none')).__module__")


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies(worker: Worker, hub: Hub, name: str) -> None:
    assert LIES[name][1] in refusal(worker, hub, name)
    if name != "pattern":  # it is a pattern to the client, of which nothing worse comes than a download
        assert not [file for file in hub.files(f"lies/{name}") if "evil" in file]
    if "plain file name" in LIES[name][1]:
        assert not [file for file in hub.files(f"lies/{name}") if file.startswith("model-")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "is not valid JSON"),
        ("generation", "is not valid JSON"),
        ("hot", "temperature='hot': must be a number"),
    ],
)
def test_small_files_that_cannot_be_used(worker: Worker, hub: Hub, name: str, words: str) -> None:
    assert words in refusal(worker, hub, name)
    assert not [file for file in hub.files(f"lies/{name}") if file.startswith("model-")]
