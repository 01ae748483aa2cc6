"""`generate`: what the library writes, on stdout; one line and the right status for everything else."""

import io
import json
import shutil
import sys

import pytest
import torch

from nemotron_h import LLM, NemotronHForCausalLM, SamplingParams, demo
from nemotron_h.errors import ModelNotFoundError
from nemotron_h.generation import llm as engine


@pytest.fixture(scope="module")
def oracle(talker):
    """The library's text for a prompt."""
    llm = LLM(talker)
    return lambda prompt, **params: llm.generate([prompt], SamplingParams(**params))[0]


def _stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_the_text_is_the_librarys(run, talker, oracle):
    outcome = run("generate", talker, "Once upon", "--max-tokens", 12, "--seed", 3)
    assert outcome.status == 0
    assert outcome.out == oracle("Once upon", max_tokens=12, temperature=0.7, seed=3).text + "\n"
    assert "tokens/s" in outcome.err
    assert "end: length" in outcome.err


def test_every_sampling_option_arrives(run, talker, monkeypatch):
    seen = []
    monkeypatch.setattr(engine.LLM, "_check_params", lambda self, params: seen.append(params))
    options = ["--max-tokens", 3, "--temperature", 0.5, "--top-p", 0.9, "--top-k", 7, "--min-p", 0.1, "--seed", 5]
    assert run("generate", talker, "a", *options, "--stop", "x", "--stop", "y", "--ignore-eos").status == 0
    assert seen == [
        SamplingParams(
            max_tokens=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=5, stop=["x", "y"], ignore_eos=True
        )
    ]


def test_every_loading_option_arrives(run, talker, monkeypatch):
    seen = {}
    init = engine.LLM.__init__

    def recorded(self, model, **options):
        seen.update(options)
        init(self, model, **options)

    monkeypatch.setattr(engine.LLM, "__init__", recorded)
    options = ["--dtype", "bfloat16", "--device", "cpu", "--threads", 1, "--max-tokens", 1]
    assert run("generate", talker, "a", *options).status == 0
    assert seen == {"dtype": "bfloat16", "device": "cpu", "threads": 1}


def test_json(run, talker, oracle):
    outcome = run("generate", talker, "Once upon", "--max-tokens", 5, "--temperature", 0, "--json")
    expected = oracle("Once upon", max_tokens=5, temperature=0)
    result = outcome.json
    assert outcome.status == 0
    assert (result["text"], result["token_ids"]) == (expected.text, expected.token_ids)
    assert (result["finish_reason"], result["error"], result["model"]) == ("length", None, str(talker))
    assert result["usage"] == {"prompt_tokens": expected.usage.prompt_tokens, "completion_tokens": 5}
    assert result["decode"]["tokens_per_second"] == pytest.approx(
        result["decode"]["tokens"] / result["decode"]["seconds"]
    )


def test_a_hub_id_goes_to_the_library(run, monkeypatch):
    def missing(self, model, **options):
        raise ModelNotFoundError(f"{model}: not there")

    monkeypatch.setattr(engine.LLM, "__init__", missing)
    outcome = run("generate", "owner/name", "Hello")
    assert outcome.status == 2
    assert outcome.error == "error: owner/name: not there"


def test_one_argument_is_a_prompt_for_the_shipped_model(run, monkeypatch, talker):
    monkeypatch.setattr(demo, "demo_model", lambda: talker)
    options = ["--max-tokens", 4, "--temperature", 0]
    assert run("generate", "Once upon", *options).out == run("generate", talker, "Once upon", *options).out


def test_a_prompt_from_stdin(run, talker, oracle, monkeypatch):
    _stdin(monkeypatch, "Zoë says".encode())
    options = ["--max-tokens", 4, "--temperature", 0]
    assert run("generate", talker, "-", *options).out == oracle("Zoë says", max_tokens=4, temperature=0).text + "\n"


def test_token_ids(run, talker, mute, oracle):
    options = ["--max-tokens", 4, "--temperature", 0, "--ignore-eos"]
    expected = oracle([5, 6, 7], max_tokens=4, temperature=0, ignore_eos=True)
    assert run("generate", talker, "--ids", "5,6 7", *options).out == expected.text + "\n"
    numbers = run("generate", mute, "--ids", "5,6,7", *options)  # there is no tokenizer
    result = run("generate", mute, "--ids", "5,6,7", *options, "--json").json
    assert [int(word) for word in numbers.out.split()] == result["token_ids"]
    assert len(result["token_ids"]) == 4
    assert result["text"] == ""


def test_text_that_stdout_cannot_encode(run, talker, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(engine.Text, "decoder", lambda self: type("D", (), {"push": lambda s, t: "ä", "finish": str})())
    assert run("generate", talker, "a", "--max-tokens", 1).status == 0
    assert raw.getvalue().startswith(b"\\xe4")


def test_logits_that_are_not_finite(run, talker, tmp_path):
    directory = _copy(talker, tmp_path)
    model = NemotronHForCausalLM.from_pretrained(talker)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(directory)
    outcome = run("generate", directory, "Once")
    assert outcome.status == 1
    assert "not finite" in outcome.error
    result = run("generate", directory, "Once", "--json")
    assert result.status == 1
    assert (result.json["finish_reason"], "not finite" in result.json["error"]) == ("error", True)


def _copy(talker, tmp_path):
    return shutil.copytree(talker, tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected [MODEL] PROMPT"),
        (["MODEL", "a", "b"], "quote a prompt"),
        (["MODEL", ""], "the prompt is empty"),
        ([""], "the prompt is empty"),
        (["MODEL", "--ids", ""], "the prompt is empty"),
        (["MODEL", "--ids", "1,x"], "--ids 1,x"),
        (["MODEL", "--ids", "1,99999999"], "token ids must lie in"),
        (["MODEL", "--ids", "9" * 5000], "--ids 999"),
        (["MODEL", "a", "--ids", "1"], "not both"),
        (["MODEL"], "is a model: give a prompt"),
        (["MODEL", "a\udcffb"], "not valid UTF-8"),
        (["MODEL", "word " * 600], "max_model_len"),
        (["MODEL", "a", "--max-tokens", "0"], "max_tokens=0"),
        (["MODEL", "a", "--temperature", "-1"], "temperature=-1"),
        (["MODEL", "a", "--temperature", "nan"], "temperature=nan"),
        (["MODEL", "a", "--top-p", "2"], "top_p=2"),
        (["MODEL", "a", "--seed", "-5"], "seed=-5"),
        (["MODEL", "a", "--stop", ""], "stop="),
        (["MODEL", "a", "--dtype", "int8"], "--dtype int8"),
        (["MODEL", "a", "--device", "abacus"], "--device abacus"),
        (["MODEL", "a", "--device", "meta"], "--device meta"),
        (["MODEL", "a", "--threads", "0"], "threads=0"),
        (["MODEL", "a", "--adapter", "x"], "x"),
        (["MODEL", "a", "--quantization", "int3"], "--quantization int3: must be one of bf16, int8, int4"),
        (["/no/such/model", "a"], "no such directory"),
        (["nemotron-h-8b", "a"], "nemotron-h init nemotron-h-8b DIR"),
        (["nemotron-9b", "a"], "did you mean the preset"),
    ],
)
def test_wrong_use(run, talker, arguments, words):
    outcome = run("generate", *(str(talker) if word == "MODEL" else word for word in arguments))
    assert outcome.status == 2
    assert outcome.out == ""
    assert words in outcome.error


def test_ids_without_a_tokenizer_only(run, mute):
    assert "no tokenizer" in run("generate", mute, "Once").error


def _truncated(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(20000)


def _unweighted(directory):
    (directory / "model.safetensors").unlink()


def _reconfigured(**changes):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncated, "cut short"),
        (_unweighted, "has neither model.safetensors nor"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json"),
        (lambda directory: (directory / "config.json").unlink(), "config.json"),
        (lambda directory: (directory / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (_reconfigured(ssm_state_size=17), "does not fit the model"),
        (_reconfigured(hidden_size=-5), "hidden_size=-5"),
        (_reconfigured(model_type="llama"), "llama"),
    ],
)
def test_damaged_models(run, talker, tmp_path, damage, words):
    directory = _copy(talker, tmp_path)
    damage(directory)
    for outcome in (run("generate", directory, "a"), run("generate", directory, "a", "--json")):
        assert outcome.status == 2
        assert words in outcome.error
    assert words in outcome.json["error"]["message"]


def test_quantization_packs_while_loading(run, monkeypatch):
    seen = []
    right = NemotronHForCausalLM.from_pretrained
    monkeypatch.setattr(
        NemotronHForCausalLM, "from_pretrained", lambda *a, **k: seen.append(k.get("quantization")) or right(*a, **k)
    )
    plain = run("generate", "Elizabeth", "--max-tokens", "8", "--temperature", "0")
    for name in ("bf16", "int4"):
        packed = run("generate", "Elizabeth", "--max-tokens", "8", "--temperature", "0", "--quantization", name)
        assert plain.status == packed.status == 0
        assert packed.out.strip()
        assert packed.out == plain.out or name != "bf16"
    assert seen == [None, "bf16", "int4"]
