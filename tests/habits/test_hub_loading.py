"""Models by hub id, against a stand-in for the hub: what is fetched, which revision, and what happens without it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_stand_in import Hub, Worker, running_hub
from safetensors.torch import load_file

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM, demo_model

SUM = "float(sum(p.double().sum() for p in {}.parameters()))"


def checksum(model: NemotronHForCausalLM) -> float:
    return float(sum(p.double().sum() for p in model.parameters()))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints, each beside files that nobody should want."""
    root, made = tmp_path_factory.mktemp("hub"), {}
    sizes = {"single": "5GB", "second": "5GB", "sharded": "20KB"}
    for seed, (name, size) in enumerate(sizes.items()):
        made[name] = root / name
        tiny_model(seed=seed, vocab_size=2048).save_pretrained(made[name], max_shard_size=size)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(demo_model() / file, made[name])
        for file in ("pytorch_model.bin", "training_args.bin", "modeling_evil.py", "model.gguf", "README.md"):
            (made[name] / file).write_bytes(b"raise SystemExit")
    made["pickle"] = root / "pickle"
    made["pickle"].mkdir()
    shutil.copy(made["single"] / "config.json", made["pickle"])
    (made["pickle"] / "pytorch_model.bin").write_bytes(b"pickle")
    made["damaged"] = root / "damaged"
    shutil.copytree(made["single"], made["damaged"])
    weights = made["damaged"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return made


@pytest.fixture(scope="module")
def hub(directories: dict[str, Path]) -> Iterator[Hub]:
    with running_hub() as hub:
        repository = hub.add("nvidia/tiny")
        repository.add(directories["second"], "main")
        hub.first = repository.add(directories["single"], "v1", "release")
        hub.add("nvidia/sharded", directories["sharded"])
        hub.add("nvidia/pickle", directories["pickle"])
        hub.add("nvidia/damaged", directories["damaged"])
        hub.add("nvidia/gated", directories["single"], gated=True)
        hub.add("nvidia/private", directories["single"], token="secret")
        hub.add("nvidia/cut", directories["single"], broken="truncated")
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> Iterator[Worker]:
    worker = Worker(home, hub.url)
    yield worker
    worker.close()


def test_only_what_is_needed_is_fetched(online: Worker, hub: Hub, directories: dict[str, Path]) -> None:
    for name, kind in (("nvidia/tiny", "second"), ("nvidia/sharded", "sharded")):
        expected = checksum(NemotronHForCausalLM.from_pretrained(directories[kind]))
        hub.requests.clear()
        found = online.result(f"m = NemotronHForCausalLM.from_pretrained({name!r}); result = {SUM.format('m')}")
        assert found == expected
        wanted = {file for file in hub.files(name) if not file.endswith((".safetensors", ".json"))}
        assert not wanted
        got = [
            request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET") and "store" in request
        ]
        assert sorted(got) == sorted(path.name for path in directories[kind].glob("*.safetensors"))
    hub.requests.clear()
    online.result("AutoTokenizer.from_pretrained('nvidia/tiny'); result = 1")
    assert not [request for request in hub.requests if request.endswith((".py", ".bin", ".gguf", ".safetensors"))]


def test_every_way_to_a_model(online: Worker) -> None:
    for call, module in (
        ("NemotronHModel.from_pretrained('nvidia/tiny')", "nemotron_h.modeling"),
        ("AutoModelForCausalLM.from_pretrained('nvidia/tiny')", "nemotron_h.modeling"),
        ("AutoModel.from_pretrained('nvidia/sharded')", "nemotron_h.modeling"),
        ("NemotronHConfig.from_pretrained('nvidia/tiny')", "nemotron_h.configuration"),
        ("AutoConfig.from_pretrained('nvidia/tiny')", "nemotron_h.configuration"),
        ("LLM('nvidia/tiny').model", "nemotron_h.modeling"),
        ("pipeline('text-generation', 'nvidia/tiny').model", "nemotron_h.modeling"),
    ):
        assert online.result(f"result = type({call}).__module__") == module, call
    text = "LLM('nvidia/tiny').generate([[3, 4]], SamplingParams(max_tokens=4, temperature=0))[0].token_ids"
    assert len(online.result(f"result = {text}")) == 4


def test_revisions(online: Worker, hub: Hub, directories: dict[str, Path]) -> None:
    first, second = (checksum(NemotronHForCausalLM.from_pretrained(directories[name])) for name in ("single", "second"))
    assert first != second
    for revision, expected in (("v1", first), (hub.first, first), ("release", first), ("main", second)):
        for cls in ("NemotronHForCausalLM", "AutoModelForCausalLM"):
            call = f"m = {cls}.from_pretrained('nvidia/tiny', revision={revision!r}); result = {SUM.format('m')}"
            assert online.result(call) == expected, revision


def test_a_token_is_sent(online: Worker, hub: Hub) -> None:
    answer = online.ask("NemotronHForCausalLM.from_pretrained('nvidia/private')")
    assert answer["error"][0] == "ModelNotFoundError"
    hub.tokens.clear()
    online.result("NemotronHForCausalLM.from_pretrained('nvidia/private', token='secret'); result = 1")
    assert hub.tokens == {"Bearer secret"}


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ("NemotronHForCausalLM.from_pretrained('nvidia/missing')", "ModelNotFoundError", "nvidia/missing"),
        ("NemotronHForCausalLM.from_pretrained('nvidia/tiny', revision='v9')", "ModelNotFoundError", "v9"),
        ("NemotronHForCausalLM.from_pretrained('nvidia/gated')", "ModelNotFoundError", "gated"),
        ("NemotronHForCausalLM.from_pretrained('nvidia/pickle')", "CheckpointError", "never loaded"),
        ("AutoModelForCausalLM.from_pretrained('nvidia/pickle')", "CheckpointError", "never loaded"),
        ("NemotronHForCausalLM.from_pretrained('nvidia/damaged')", "CheckpointError", "model.safetensors"),
        ("AutoModelForCausalLM.from_pretrained('nvidia/damaged')", "CheckpointError", "model.safetensors"),
        ("NemotronHConfig.from_pretrained('nvidia/missing')", "ModelNotFoundError", "nvidia/missing"),
        ("LLM('nvidia/missing')", "ModelNotFoundError", "nvidia/missing"),
        ("LLM('nvidia/cut')", "ModelNotFoundError", "without sending complete message body"),
    ],
)
def test_errors_are_typed_and_one_line(online: Worker, call: str, kind: str, words: str) -> None:
    answer = online.ask(call)
    assert answer["error"][0] == kind, answer["message"]
    assert "NemotronHError" in answer["error"]
    assert words in answer["message"]
    assert "\n" not in answer["message"]


def test_command_line(online: Worker) -> None:
    answer = online.ask("result = main(['generate', 'nvidia/tiny', '--ids', '3,4', '--max-tokens', '3'])")
    assert answer["result"] == 0
    assert answer["out"].strip()
    answer = online.ask("result = main(['info', 'nvidia/sharded', '--json'])")
    assert answer["result"] == 0
    for command in (["generate", "nvidia/missing", "x"], ["info", "nvidia/missing"], ["generate", "nvidia/gated", "x"]):
        answer = online.ask(f"result = main({command!r})")
        assert answer["result"] == 2, command
        errors = [line for line in answer["err"].splitlines() if line.startswith("error: ")]
        assert len(errors) == 1


def test_offline_from_the_cache_and_without_it(online: Worker, hub: Hub, home: Path) -> None:
    online.result("NemotronHForCausalLM.from_pretrained('nvidia/tiny'); result = 1")
    online.result("AutoTokenizer.from_pretrained('nvidia/tiny'); result = 1")
    worker = Worker(home, "http://127.0.0.1:1", HF_HUB_OFFLINE="1")
    hub.requests.clear()
    call = f"m = NemotronHForCausalLM.from_pretrained('nvidia/tiny'); result = {SUM.format('m')}"
    answer = worker.ask(call)
    assert answer["result"] == online.result(call)
    for call in (
        "result = len(LLM('nvidia/tiny').generate('A horse', SamplingParams(max_tokens=3, seed=1))[0].token_ids)",
        "result = type(AutoTokenizer.from_pretrained('nvidia/tiny')).__name__",
        "result = main(['info', 'nvidia/tiny'])",
    ):
        answer = worker.ask(call)
        assert "error" not in answer, answer
        assert answer["events"] == []
    for call in ("NemotronHForCausalLM.from_pretrained('nvidia/never')", "LLM('nvidia/never')"):
        answer = worker.ask(call)
        assert answer["error"][0] == "ModelNotFoundError"
        assert "nvidia/never" in answer["message"]
        assert answer["events"] == []
    worker.close()


def test_what_was_fetched_is_what_the_hub_has(online: Worker, home: Path, directories: dict[str, Path]) -> None:
    online.result("NemotronHForCausalLM.from_pretrained('nvidia/sharded'); result = 1")
    snapshots = list((home / "hub" / "models--nvidia--sharded" / "snapshots").iterdir())
    assert len(snapshots) == 1
    for file in directories["sharded"].glob("*.safetensors"):
        mine, theirs = load_file(file), load_file(snapshots[0] / file.name)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
