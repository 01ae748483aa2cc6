"""A checkpoint that is not exactly what the config asks for is refused, in one error, before any data is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from loading_cases import SINGLE, Tensors, read_config, read_weights, renamed, stacked, write_weights

from helpers import tiny_config, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHModel, family, filling
from nemotron_h.checkpoint.safetensors import TensorReader
from nemotron_h.errors import CheckpointError

SIZES = {
    "hybrid_override_pattern": "ME*-", "n_routed_experts": 3, "n_group": 1, "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "-", "hidden_size": 8, "vocab_size": 12, "mlp_bias": True,
}  # fmt: skip
NAMES = [name for name, _ in family.tensors(tiny_config(**SIZES))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    tiny_model(**SIZES).save_pretrained(directory)
    return directory


@pytest.fixture
def saved(source: Path, tmp_path: Path) -> Path:
    """A sound checkpoint, the test's own."""
    return Path(shutil.copytree(source, tmp_path / "saved"))


@pytest.fixture
def tensors(saved: Path) -> Tensors:
    """The checkpoint's tensors, to be changed and written back."""
    tensors = read_weights(saved)
    assert set(tensors) == set(NAMES)
    return tensors


def refusal(directory: Path, tensors: Tensors | None = None, kind: type = NemotronHForCausalLM) -> str:
    """The error's text; it must come before a tensor is read, made or put anywhere."""
    if tensors is not None:
        write_weights(directory, {SINGLE: tensors})

    def never(*_: object) -> None:
        raise AssertionError("data was touched before the checkpoint was refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorReader, "read", never)
        patch.setattr(filling, "put", never)
        patch.setattr(filling, "_assemble", never)
        with pytest.raises(CheckpointError) as error:
            kind.from_pretrained(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor(saved: Path, tensors: Tensors, name: str) -> None:
    tensor = tensors.pop(name)
    assert f"1 missing: {name}. " in refusal(saved, tensors)

    text = refusal(saved, tensors | {name + "2": tensor})
    assert f"1 missing: {name}; 1 unexpected: {name}2. " in text

    longer = torch.cat([tensor, tensor[:1]])
    shapes = f"{list(longer.shape)}, expected {list(tensor.shape)}"
    assert f"1 wrong: {name} is {shapes}. " in refusal(saved, tensors | {name: longer})
    assert f"1 wrong: {name} is " in refusal(saved, tensors | {name: tensor[None]}), "a dimension of 1 too many"
    if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
        assert f"1 wrong: {name} is " in refusal(saved, tensors | {name: tensor.T.contiguous()})

    for dtype, short in (
        (torch.int64, "I64"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.bool, "BOOL"),
    ):
        text = refusal(saved, tensors | {name: tensor.to(dtype)})
        assert f"1 wrong: {name} is {short}, expected one of F64, F32, BF16, F16. " in text


def test_every_problem_is_in_the_one_error(saved: Path, tensors: Tensors) -> None:
    missing = [NAMES[i] for i in (3, 9, 14)]
    for name in missing:
        del tensors[name]
    tensors |= {"a.stranger": torch.ones(1), "backbone.layers.7.norm.weight": torch.ones(8)}
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].to(torch.int32)
    tensors["model.norm_f.weight"] = torch.ones(8)
    text = refusal(saved, tensors)
    assert f"3 missing: {', '.join(missing)}; " in text
    assert "2 unexpected: a.stranger, backbone.layers.7.norm.weight; " in text
    assert "two spellings of backbone.norm_f.weight" in text
    assert "lm_head.weight is I32" in text
    assert "lm_head.weight is [5, 8], expected [12, 8]" in text
    assert str(saved) in text
    assert "nothing was loaded" in text


def test_a_checkpoint_of_another_model_is_described_in_bounds(saved: Path) -> None:
    strangers = {f"decoder.block.{i}.weight": torch.ones(1) for i in range(1000)}
    text = refusal(saved, strangers)
    assert f"{len(NAMES)} missing: {NAMES[0]}, " in text
    assert "1000 unexpected: decoder.block.0.weight, " in text
    assert "and 950 more" in text
    assert len(text) < 8000


def test_expert_ids_with_a_gap(saved: Path, tensors: Tensors) -> None:
    """0, 1, 7 of 0, 1, 2: the count is right."""
    text = refusal(saved, renamed(tensors, lambda n: n.replace(".experts.2.", ".experts.7.")))
    for projection in ("up_proj", "down_proj"):
        assert f"backbone.layers.1.mixer.experts.2.{projection}.weight" in text
        assert f"backbone.layers.1.mixer.experts.7.{projection}.weight" in text
    assert "2 missing" in text
    assert "2 unexpected" in text


@pytest.mark.parametrize("wrong", ["02", "-2", "2 ", "٢"])
def test_expert_ids_that_are_no_ids(saved: Path, tensors: Tensors, wrong: str) -> None:
    respelt = renamed(tensors, lambda n: n.replace(".experts.2.", f".experts.{wrong}."))
    text = refusal(saved, respelt)
    assert "2 missing: backbone.layers.1.mixer.experts.2.up_proj.weight" in text


def test_one_expert_too_few_or_too_many_in_a_stack(saved: Path, tensors: Tensors) -> None:
    stack = stacked(tensors)
    name = "backbone.layers.1.mixer.experts.up_proj"
    for changed in (stack[name][:2], torch.cat([stack[name], stack[name][:1]])):
        assert f"1 wrong: {name} is [{len(changed)}, " in refusal(saved, stack | {name: changed})


def test_experts_both_stacked_and_single(saved: Path, tensors: Tensors) -> None:
    text = refusal(saved, tensors | stacked(tensors))
    assert "6 unexpected: " in text
    assert all(f"experts.{e}.{p}_proj.weight" in text for e in range(3) for p in ("up", "down"))


def test_bias_of_some_experts_only(saved: Path, tensors: Tensors) -> None:
    tensors["backbone.layers.1.mixer.experts.1.up_proj.bias"] = torch.ones(24)
    text = refusal(saved, tensors)
    assert "5 missing: backbone.layers.1.mixer.experts.0.up_proj.bias" in text
    assert "experts.1.up_proj.bias" not in text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("backbone.norm_f.weight", "model.norm_f.weight"),
        ("backbone.embeddings.weight", "backbone.embedding.weight"),
        ("backbone.embeddings.weight", "embedding.weight"),
        ("backbone.layers.0.norm.weight", "language_model.model.layers.0.norm.weight"),
        ("backbone.layers.1.mixer.gate.e_score_correction_bias", "backbone.layers.1.mixer.e_score_correction_bias"),
        ("backbone.layers.1.mixer.gate.e_score_correction_bias", "backbone.layers.1.mixer.e_score_correction.bias"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_two_spellings_of_one_tensor(saved: Path, tensors: Tensors, first: str, second: str) -> None:
    if second.startswith("language_model."):
        inside = renamed(tensors, lambda name: "language_model." + name)
        text = refusal(saved, inside | {first: tensors[first]})
        assert "1 wrong: " in text
    else:
        text = refusal(saved, tensors | {second: tensors[first]})
        assert f"{second} and {first}" in text or f"{first} and {second}" in text
    assert f"two spellings of {first}" in text


def test_scales_say_that_the_weights_are_quantized(saved: Path, tensors: Tensors) -> None:
    name = "backbone.layers.3.mixer.up_proj.weight"
    packed = tensors | {name: tensors[name].to(torch.float8_e4m3fn)}
    for extra in ({}, {name + "_scale": torch.tensor(0.5)}):
        text = refusal(saved, packed | extra)
        assert f"{name} is F8_E4M3" in text
        assert "the weights are quantized: this version reads float32, bfloat16 and float16" in text
    assert "quantized" in refusal(saved, tensors | {name + "_scale": torch.tensor(0.5)}), "a scale alone is enough"


def test_language_model_of_another_size(saved: Path) -> None:
    config = read_config(saved)
    for field, value, name in (
        ("vocab_size", 13, "backbone.embeddings.weight"),
        ("num_attention_heads", 8, "backbone.layers.2.mixer.q_proj.weight"),
        ("n_routed_experts", 4, "backbone.layers.1.mixer.experts.3.up_proj.weight"),
        ("moe_latent_size", None, "backbone.layers.1.mixer.fc1_latent_proj.weight"),
        ("attention_bias", True, "backbone.layers.2.mixer.q_proj.bias"),
        ("num_nextn_predict_layers", 2, "mtp.layers.1.norm.weight"),
    ):
        (saved / "config.json").write_text(json.dumps(config | {field: value}))
        text = refusal(saved)
        assert name in text, field
        assert "does the config belong to these weights?" in text


def test_trunk_is_as_strict(saved: Path, tensors: Tensors) -> None:
    del tensors["backbone.layers.3.mixer.down_proj.bias"]
    assert "1 missing: backbone.layers.3.mixer.down_proj.bias. " in refusal(saved, tensors, NemotronHModel)
    tensors["backbone.layers.3.mixer.down_proj.bias"] = torch.ones(9)
    assert "1 wrong: backbone.layers.3.mixer.down_proj.bias is [9], expected [8]. " in refusal(
        saved, tensors, NemotronHModel
    )


def test_values_are_not_judged(saved: Path, tensors: Tensors) -> None:
    """NaN and infinity are `verify`'s business; they arrive as they are."""
    name = "backbone.layers.3.mixer.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0, :2] = torch.tensor([float("nan"), float("-inf")])
    write_weights(saved, {SINGLE: tensors})
    weight = NemotronHForCausalLM.from_pretrained(saved).model.layers[3].mixer.up_proj.weight
    assert weight[0, 0].isnan()
    assert weight[0, 1] == float("-inf")
