"""`verify`: says yes to a sound model, and no, with the reason, to every kind of broken one."""

import os

import pytest
import torch
import transformers

from helpers import draw_weights, tiny_model
from nemotron_h import NemotronHForCausalLM, verification
from nemotron_h.errors import InputError, UnsupportedError
from nemotron_h.ops import mamba_step, norm, ssd
from nemotron_h.steps import BlockStep
from nemotron_h.verification import verify

QUICK = ("--max-tokens", "12")


def _by_path(report):
    return {comparison["path"]: comparison for comparison in report["comparisons"]}


def test_a_sound_model(run, talker):
    outcome = run("verify", talker, *QUICK)
    assert outcome.status == 0
    assert "everything agrees" in outcome.out
    report = run("verify", talker, *QUICK, "--json").json
    assert report["ok"] is True
    assert report["prompts"] == 3
    assert report["dtype"] == "float32"
    assert len(report["comparisons"]) == 2
    for comparison in report["comparisons"]:
        assert comparison["judged"] is True
        assert 0 <= comparison["max_delta"] <= comparison["bound"]
        assert comparison["mean_kl"] < 1e-6
        assert comparison["agreement"] == 1


def test_the_bound(mute):
    model = NemotronHForCausalLM.from_pretrained(mute)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        largest = float(model(torch.tensor([ids])).logits.abs().max())
    assert largest > 1
    for comparison in verify(mute, prompts=[ids]).comparisons:
        assert comparison.bound == pytest.approx(2e-4 * largest, rel=1e-5)


def test_against_transformers_the_floor_is_explained(run, mute):
    report = run("verify", mute, "--against", "transformers", *QUICK, "--json")
    paths = _by_path(report.json)
    floored, lifted = paths["transformers, as it is"], paths["transformers, floor lifted"]
    assert report.status == 0
    assert floored["max_delta"] > floored["bound"]
    assert floored["judged"] is False
    assert floored["mean_kl"] > 1e-6 > lifted["mean_kl"]
    assert lifted["judged"] is True
    assert lifted["max_delta"] <= lifted["bound"]
    assert report.json["floor"]["time_step_min"] == 0.001
    assert report.json["floor"]["share"] > 0.5  # dt_bias is about -9: steps of 1e-4
    text = run("verify", mute, "--against", "transformers", *QUICK).out
    assert "time_step_min=0.001" in text
    assert f"{report.json['floor']['share']:.2%}" in text


def test_a_share_of_zero(tmp_path):
    draw_weights(tiny_model(), dt_bias=2.0).save_pretrained(tmp_path)
    floor = verify(tmp_path, prompts=[[1, 2, 3]]).floor
    assert floor is not None
    assert floor.share == 0


def test_the_share_is_counted_over_every_step(tmp_path):
    model = draw_weights(tiny_model())
    for layer in model.model.layers:
        if layer.block_type == "mamba":
            layer.mixer.in_proj.weight.data[-6:] = 0  # the six heads' time steps: softplus(dt_bias) for every token
            layer.mixer.dt_bias.data = torch.tensor([-9.0, -8.0, -9.0, 1.0, 1.0, 1.0])
    model.save_pretrained(tmp_path)
    floor = verify(tmp_path, prompts=[[1, 2, 3], [4]]).floor
    assert floor is not None
    assert floor.share == 0.5


def test_a_wrong_step_is_found(run, mute, monkeypatch):
    right = ssd._STEP.reference
    monkeypatch.setattr(ssd._STEP, "reference", lambda *args: tuple(t * 1.01 for t in right(*args)))
    monkeypatch.setattr(ssd._STEP, "native", ssd._STEP.reference)
    monkeypatch.setattr(mamba_step._STEP, "refusal", lambda *args: "its parts are called one by one here")
    monkeypatch.setattr(BlockStep, "__call__", lambda *_: None)  # and so are a block's
    outcome = run("verify", mute, *QUICK)
    assert outcome.status == 1
    assert "NOT VERIFIED" in outcome.out
    paths = _by_path(run("verify", mute, *QUICK, "--json").json)
    assert paths["fast path, whole prompt"]["ok"] is True
    assert paths["fast path, token by token"]["ok"] is False


def test_a_wrong_kernel_is_found(mute, monkeypatch, environment):
    """The yardstick runs the reference; a fast implementation that errs differs from it."""
    op = norm._RMS_NORM
    monkeypatch.setattr(op, "native", lambda x, weight, eps: op.reference(x, weight, eps) * 1.01)
    monkeypatch.setattr(op, "refusal", lambda *args: None)
    report = verify(mute, prompts=[[1, 2, 3, 4]])
    assert not report.ok
    assert not report.comparisons[0].ok


def test_the_users_settings_survive(mute, environment):
    environment(NEMOTRON_H_IMPL="reference")
    assert verify(mute, prompts=[[1, 2]]).ok
    assert os.environ["NEMOTRON_H_IMPL"] == "reference"


def test_nothing_of_the_settings_stays(mute, environment):
    assert verify(mute, prompts=[[1, 2]]).ok
    assert "NEMOTRON_H_IMPL" not in os.environ


def _broken(tmp_path, name, index, value):
    model = draw_weights(tiny_model())
    model.state_dict()[name][index] = value
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run, tmp_path, value):
    outcome = run("verify", _broken(tmp_path, "model.layers.0.mixer.in_proj.weight", (3, 4), value))
    assert outcome.status == 1
    assert "1 not finite: backbone.layers.0.mixer.in_proj.weight" in outcome.out
    assert run("verify", tmp_path, "--json").json["comparisons"] == []


def test_weights_that_are_zero_throughout(run, tmp_path):
    outcome = run("verify", _broken(tmp_path, "model.layers.1.mixer.experts.up_proj", 5, 0.0), *QUICK)
    assert outcome.status == 1
    assert "1 all zero: backbone.layers.1.mixer.experts.5.up_proj.weight" in outcome.out


def test_biases_may_be_zero(tmp_path):
    model = draw_weights(tiny_model())
    model.state_dict()["model.layers.0.mixer.conv1d.bias"].zero_()
    model.save_pretrained(tmp_path)
    assert verify(tmp_path, prompts=[[1, 2]]).ok


def test_other_dtypes_are_shown_but_not_judged(run, mute):
    report = run("verify", mute, "--dtype", "bfloat16", *QUICK, "--json")
    assert report.status == 0
    assert report.json["dtype"] == "bfloat16"
    assert not any(comparison["judged"] for comparison in report.json["comparisons"])
    assert verify(mute, prompts=[[1, 2]], dtype="float64").comparisons[1].max_delta < 1e-6


def test_prompts_of_the_user(run, talker, mute, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Zoë\n\n" + "long " * 100, encoding="utf-8")
    report = run("verify", talker, "--prompts", file, *QUICK, "--json").json
    assert report["prompts"] == 2
    assert report["tokens"] == verify(talker, prompts=["Zoë"]).tokens + 12
    file.write_text("1,2,3\n4 5\n")
    assert run("verify", mute, "--prompts", file, "--json").json["tokens"] == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no prompt"),
        (b"\n \n", "no prompt"),
        (b"words", "no tokenizer"),
        (b"1,2\n50", "token ids must lie in"),
        (b"\xff", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_unusable_prompts(run, mute, tmp_path, content, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    outcome = run("verify", mute, "--prompts", file)
    assert outcome.status == 2
    assert words in outcome.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--against", "vllm"], "'vllm'"),
        (["--max-tokens", "0"], "max_tokens=0"),
        (["--dtype", "int8"], "--dtype int8"),
    ],
)
def test_wrong_use(run, mute, options, words):
    outcome = run("verify", mute, *options)
    assert outcome.status == 2
    assert words in outcome.error


def test_a_missing_model(run):
    assert run("verify", "/no/such/model").status == 2


def test_fields_that_transformers_ignores(tmp_path):
    draw_weights(tiny_model(sliding_window=3)).save_pretrained(tmp_path)
    report = verify(tmp_path, prompts=[list(range(1, 12))], against="transformers")
    lifted = report.comparisons[-1]
    assert lifted.max_delta > lifted.bound
    assert not lifted.judged
    assert report.ok
    assert any("sliding_window" in note for note in report.notes)


def test_a_tied_model(run, tmp_path):
    model = draw_weights(tiny_model(tie_word_embeddings=True), dt_bias=-9.0)
    model.save_pretrained(tmp_path)
    outcome = run("verify", tmp_path, "--against", "transformers", *QUICK, "--json")
    assert outcome.status == 0
    floored, lifted = outcome.json["comparisons"][2:]
    assert floored["max_delta"] > floored["bound"]
    assert lifted["judged"] is True
    assert any("tied" in note for note in outcome.json["notes"])
    assert outcome.json["tensors"] == run("info", tmp_path, "--json").json["files"]["tensors"]


def test_a_time_step_limit_is_given_to_the_peer(tmp_path):
    draw_weights(tiny_model(time_step_limit=(0.2, 0.4))).save_pretrained(tmp_path)
    report = verify(tmp_path, prompts=[list(range(1, 12))], against="transformers")
    assert report.comparisons[-1].judged
    assert report.ok


def test_a_peer_that_cannot_run_these_files(run, mute, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("not\nthese")

    monkeypatch.setattr(transformers.NemotronHForCausalLM, "from_pretrained", fail)
    outcome = run("verify", mute, "--against", "transformers", *QUICK)
    assert outcome.status == 1
    assert "transformers cannot run these files: ValueError: not these" in outcome.error


def test_the_library_refuses_the_same(mute):
    with pytest.raises(UnsupportedError):
        verify(mute, against="vllm")
    with pytest.raises(InputError):
        verify(mute, prompts=[[]])
    with pytest.raises(InputError):
        verify(mute, prompts=[[-1]])


def test_the_built_in_prompts_cross_a_chunk(mute, talker):
    model = NemotronHForCausalLM.from_pretrained(mute)
    assert verify(mute).tokens == 7 + 31 + model.config.mamba_chunk_size + 9
    assert len(verification.PROMPTS[-1]) > 700
