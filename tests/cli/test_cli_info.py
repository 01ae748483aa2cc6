"""`info`: exact integers from arithmetic and file headers, one line for everything that is wrong."""

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM, demo, family
from nemotron_h.checkpoint.safetensors import read_header


@pytest.mark.parametrize("name", [name for name in family.PRESETS if "puzzle" not in name])
def test_every_preset(run, name):
    facts = run("info", name, "--json").json
    count = family.count(family.describe(family.preset(name)))
    assert facts["kind"] == "preset"
    assert (facts["parameters"], facts["active_parameters"]) == (count.total, count.active)
    assert sum(facts["parameters_by_part"].values()) == facts["parameters"]
    text = run("info", name)
    assert text.status == 0
    assert f"{count.total:,}" in text.out
    assert f"{facts['memory']['int4']['weights']:,}" not in text.out  # people get gigabytes there


def test_figures_of_nano_30b(run):
    facts = run("info", "nemotron-3-nano-30b-a3b", "--json").json
    assert facts["parameters"] == 31_577_940_288
    assert facts["layers"] == {"mamba": 23, "moe": 23, "attention": 6}
    assert facts["cache_bytes_per_token"] == 6 * 2 * 2 * 128 * 2
    conv, state = (4096 + 2 * 8 * 128) * 3 * 2, 64 * 64 * 128 * 4
    assert facts["cache_bytes_fixed"] == 23 * (conv + state)
    router_biases = 23 * 128
    weights = (31_577_940_288 - router_biases) * 2 + router_biases * 4
    assert sum(facts["bytes_by_part"].values()) == weights
    assert facts["memory"]["bfloat16"] == {"weights": weights} | {
        str(context): weights + facts["cache_bytes_fixed"] + context * 6144 for context in (1024, 8192, 32768, 262144)
    }
    float32 = facts["memory"]["float32"]
    assert float32["weights"] == 31_577_940_288 * 4
    assert float32["1024"] == float32["weights"] + 23 * (2 * conv + state) + 1024 * 2 * 6144
    assert facts["memory"]["int8"]["weights"] == pytest.approx(weights / 2 * 1.0078125, rel=1e-6)
    assert facts["memory"]["int4"]["weights"] == pytest.approx(weights / 2 * 0.52734375, rel=1e-6)


def test_a_checkpoint_is_read_from_its_headers(run, talker):
    facts = run("info", talker, "--json").json
    model = NemotronHForCausalLM.from_pretrained(talker)
    state = model.state_dict()
    assert "mtp.layers.0.eh_proj.weight" in state
    total = sum(tensor.numel() for tensor in state.values())
    tensors = read_header(talker / "model.safetensors").tensors
    assert facts["kind"] == "checkpoint"
    assert facts["parameters"] == facts["files"]["parameters"] == total
    assert facts["files"]["bytes"] == sum(facts["bytes_by_part"].values()) == 4 * total
    assert facts["files"] | {"bytes": 0, "parameters": 0} == {
        "shards": 1, "tensors": len(tensors), "parameters": 0, "bytes": 0, "bytes_by_dtype": {"float32": 4 * total},
    }  # fmt: skip
    assert facts["bytes_by_part"] == {part: 4 * n for part, n in facts["parameters_by_part"].items()}
    assert {"embeddings", "mamba", "moe", "attention", "mlp", "mtp", "norm_f", "lm_head"} == set(facts["bytes_by_part"])


def test_without_a_model_it_is_the_shipped_one(run, monkeypatch, talker):
    monkeypatch.setattr(demo, "demo_model", lambda: talker)
    assert run("info").out == run("info", talker).out


def test_shards_and_dtypes(run, tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    facts = run("info", tmp_path, "--json").json
    router_biases = model.config.n_routed_experts
    assert facts["files"]["shards"] > 2
    assert facts["files"]["bytes_by_dtype"] == {
        "bfloat16": 2 * (facts["parameters"] - router_biases),
        "float32": 4 * router_biases,
    }
    assert facts["dtype"] == "bfloat16"


def test_weights_of_another_configuration_are_told(run, tmp_path, talker):
    shutil.copytree(talker, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"ssm_state_size": 17}))
    assert "the configuration describes others" in run("info", tmp_path / "model").out


def test_a_configuration_alone(run, tmp_path, talker):
    from_file = run("info", talker / "config.json", "--json").json
    (tmp_path / "config.json").write_text((talker / "config.json").read_text())
    alone = run("info", tmp_path, "--json").json
    assert from_file["files"] is alone["files"] is None
    assert from_file["parameters"] == alone["parameters"] == run("info", talker, "--json").json["parameters"]


def test_a_multimodal_configuration(run, tmp_path):
    inner = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*", "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_vl", "llm_config": inner}))
    facts = run("info", tmp_path, "--json").json
    assert (facts["pattern"], facts["vocab_size"]) == ("M*", 100)


def test_changes(run):
    facts = run("info", "nemotron-h-8b", "--set", "vocab_size=7", "--set", "hybrid_override_pattern=M*", "--json").json
    assert (facts["vocab_size"], facts["pattern"]) == (7, "M*")
    assert facts["parameters_by_part"]["embeddings"] == 7 * 4096
    untied = run("info", "nemotron-h-8b", "--set", "tie_word_embeddings=True", "--json").json
    assert "lm_head" not in untied["parameters_by_part"]
    puzzle = [{"block_type": "mamba"}, {"block_type": "moe", "n_routed_experts": 4, "num_experts_per_tok": 2}]
    facts = run("info", "nemotron-3-puzzle-75b-a9b", "--set", f"block_configs={json.dumps(puzzle)}", "--json").json
    assert facts["layers"] == {"mamba": 1, "moe": 1}
    assert sum(facts["bytes_by_part"].values()) == 2 * facts["parameters"] + 2 * 4  # four router biases in float32


def test_a_hub_id(run, monkeypatch, talker):
    def download(repository, file):
        assert (repository, file) == ("owner/name", "config.json")
        return str(talker / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    facts = run("info", "owner/name", "--json").json
    assert (facts["kind"], facts["files"]) == ("hub", None)


def test_an_unreachable_hub(run, monkeypatch):
    def download(repository, file):
        raise LocalEntryNotFoundError("\nno connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    outcome = run("info", "owner/name")
    assert outcome.status == 2
    assert outcome.error.endswith("no connection")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nemotron-h-9b"], "nemotron-h-8b"),
        (["/no/such/thing"], "no preset, no file or directory"),
        (["x" * 5000], "no preset"),
        (["nemotron-3-puzzle-75b-a9b"], "block_configs"),
        (["nemotron-h-8b", "--set", "hiden_size=8"], "'hidden_size'"),
        (["nemotron-h-8b", "--set", "colour=8"], "colour"),
        (["nemotron-h-8b", "--set", "hidden_size"], "FIELD=VALUE"),
        (["nemotron-h-8b", "--set", "hidden_size=wide"], "hidden_size='wide'"),
        (["nemotron-h-8b", "--set", "vocab_size=" + "[" * 10000], "vocab_size"),
        (["nemotron-h-8b", "--set", "mamba_n_groups=7"], "must divide"),
    ],
)
def test_unusable_shapes(run, arguments, words):
    outcome = run("info", *arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert words in outcome.error


def _truncated(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(20000)


def _pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _config(text):
    return lambda directory: (directory / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncated, "cut short"),
        (_pickled, "pickle"),
        (lambda directory: (directory / "config.json").unlink(), "config.json"),
        (_config("{"), "not valid JSON"),
        (_config("[]"), "must be a JSON object"),
        (_config('{"model_type": "llama"}'), "llama"),
        (_config('{"vocab_size": 5, "vocab_size": 6}'), "twice"),
        (_config('{"vocab_size": -5}'), "vocab_size=-5"),
        (_config("[" * 100_000), "nests deeper"),
    ],
)
def test_damaged_checkpoints(run, tmp_path, talker, damage, words):
    directory = shutil.copytree(talker, tmp_path / "model")
    damage(directory)
    outcome = run("info", directory)
    assert outcome.status == 2
    assert outcome.out == ""
    assert words in outcome.error


def test_other_files(run, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "GGUF" in run("info", tmp_path / "model.gguf").error
