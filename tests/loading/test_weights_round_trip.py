"""What is saved is loaded bit for bit, whatever the configuration, the dtype and the number of files."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_cases import (
    INDEX,
    SINGLE,
    assert_same_tensors,
    assert_whole,
    configurations,
    file_bytes,
    read_config,
    read_weights,
    weight_files,
)

from helpers import draw_weights, tiny_config, tiny_model
from nemotron_h import NemotronHConfig, NemotronHForCausalLM, NemotronHModel, family
from nemotron_h.errors import CheckpointError, InputError, UnsupportedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@settings(max_examples=40)
@given(configurations(), st.sampled_from(DTYPES), st.booleans(), st.sampled_from(["5GB", "2KB", 300]))
def test_any_configuration(config: NemotronHConfig, dtype: torch.dtype, expert_bias: bool, size: str | int) -> None:
    model = draw_weights(NemotronHForCausalLM(config), expert_bias=expert_bias).to(dtype)
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        model.save_pretrained(first, max_shard_size=size)
        written = read_weights(Path(first))
        shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
        biases = {name for name in shapes if ".experts." in name and name.endswith(".bias")}
        experts = [name for name in shapes if ".experts." in name and name.endswith(".weight")]
        assert {name: shape for name, shape in shapes.items() if name not in biases} == dict(family.tensors(config))
        assert len(biases) == (len(experts) if expert_bias else 0)

        loaded = NemotronHForCausalLM.from_pretrained(first)
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        assert_whole(loaded)
        assert dict(family.tensors(loaded.config)) == dict(family.tensors(config))
        assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == config.tie_word_embeddings

        loaded.save_pretrained(second, max_shard_size=size)
        assert file_bytes(Path(second)) == file_bytes(Path(first)), "saving again writes the same bytes"

        trunk = NemotronHModel.from_pretrained(first)
        assert_same_tensors(trunk.state_dict(), model.model.state_dict())
        assert_whole(trunk)


def test_loading_draws_nothing(tmp_path: Path) -> None:
    tiny_model(num_nextn_predict_layers=1).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    _, info = NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(info.values()), f"nothing is missing, unexpected or mismatched: {info}"


def test_shards_hold_no_more_than_asked(tmp_path: Path) -> None:
    model = tiny_model(num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = weight_files(tmp_path)
    assert len(files) > 5
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert all(file.stat().st_size < 20_000 + 4_000 for file in files), "headers come on top"
    assert sum(len(read) for read in map(_names, files)) == len(read_weights(tmp_path)), "each tensor once"
    assert_same_tensors(NemotronHForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def _names(file: Path) -> list[str]:
    header = int.from_bytes(file.read_bytes()[:8], "little")
    return [name for name in json.loads(file.read_bytes()[8 : 8 + header]) if name != "__metadata__"]


def test_saving_over_an_older_checkpoint(tmp_path: Path) -> None:
    old, new = tiny_model(seed=1), tiny_model(seed=2, hybrid_override_pattern="M*")
    for model, size in ((old, "20KB"), (new, "5GB"), (old, "20KB"), (new, "9KB")):
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert (tmp_path / SINGLE).exists() != (tmp_path / INDEX).exists()
        loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
        assert_same_tensors(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("asked", [None, "auto", "float32", *DTYPES])
def test_dtype(tmp_path: Path, saved: torch.dtype, asked: torch.dtype | str | None) -> None:
    model = tiny_model(hybrid_override_pattern="ME").to(saved)
    model.save_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path, **({} if asked is None else {"dtype": asked}))
    expected = saved if asked in (None, "auto") else getattr(torch, asked) if isinstance(asked, str) else asked
    router = torch.promote_types(expected, torch.float32)
    for name, tensor in loaded.state_dict().items():
        wide = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (router if wide else expected), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    assert loaded.dtype == loaded.config.dtype == expected


def test_router_bias_is_never_rounded(tmp_path: Path) -> None:
    model = tiny_model(hybrid_override_pattern="E")
    bias = model.model.layers[0].mixer.gate.e_score_correction_bias.clone()
    assert not torch.equal(bias, bias.bfloat16().float())
    model.bfloat16().save_pretrained(tmp_path)
    assert read_weights(tmp_path)["backbone.layers.0.mixer.gate.e_score_correction_bias"].dtype == torch.float32
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    for again in (loaded, loaded.bfloat16(), loaded.half(), loaded.to(torch.bfloat16), loaded.float()):
        kept = again.model.layers[0].mixer.gate.e_score_correction_bias
        assert kept.dtype == torch.float32
        assert torch.equal(kept, bias)


def test_dtype_of_the_weights_where_the_config_names_none(tmp_path: Path) -> None:
    tiny_model(hybrid_override_pattern="M*").bfloat16().save_pretrained(tmp_path)
    config = read_config(tmp_path)
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert NemotronHForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_language_model_needs_its_head(tmp_path: Path) -> None:
    """A trunk alone loads as a trunk; as a language model only where the head is the embedding."""
    trunk = NemotronHModel(tiny_config())
    trunk.save_pretrained(tmp_path)
    assert_same_tensors(NemotronHModel.from_pretrained(tmp_path).state_dict(), trunk.state_dict())
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight\. "):
        NemotronHForCausalLM.from_pretrained(tmp_path)

    trunk = NemotronHModel(tiny_config(tie_word_embeddings=True))
    trunk.save_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(loaded.model.state_dict(), trunk.state_dict())
    assert loaded.lm_head.weight is loaded.model.embeddings.weight


def test_trunk_with_its_heads_needs_them(tmp_path: Path) -> None:
    NemotronHModel(tiny_config(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="-")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"8 missing: lm_head\.weight, mtp\.layers\.0\.norm\.weight"):
        NemotronHForCausalLM.from_pretrained(tmp_path)


def test_state_dict_instead_of_files() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    given = model.state_dict()
    loaded = NemotronHForCausalLM.from_pretrained(None, config=model.config, state_dict=given)
    assert_same_tensors(loaded.state_dict(), given)
    assert_whole(loaded)
    own = {t.data_ptr() for t in given.values()}
    assert not any(t.data_ptr() in own for t in loaded.state_dict().values()), "training one must not change the other"

    half = NemotronHForCausalLM.from_pretrained(None, config=model.config, state_dict=given, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    given.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"state_dict.*1 missing: lm_head\.weight"):
        NemotronHForCausalLM.from_pretrained(None, config=model.config, state_dict=given)
    with pytest.raises(InputError, match=r"state_dict\['lm_head.weight'\] must be a tensor, is list"):
        NemotronHForCausalLM.from_pretrained(None, config=model.config, state_dict=given | {"lm_head.weight": [1.0]})
    with pytest.raises(InputError, match="give a path"):
        NemotronHForCausalLM.from_pretrained(None, config=model.config)


def test_saving_a_given_state_dict(tmp_path: Path) -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same_tensors(NemotronHForCausalLM.from_pretrained(tmp_path).state_dict(), other.state_dict())


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    config, weights = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == config
    assert_same_tensors(model.state_dict(), weights)
    assert read_config(tmp_path)["architectures"] == ["NemotronHForCausalLM"]
    assert read_config(tmp_path)["dtype"] == "float32"


def test_a_config_of_quantized_weights_is_saved_without_them(tmp_path: Path) -> None:
    model = draw_weights(NemotronHForCausalLM(tiny_config(quantization_config={"quant_method": "modelopt"})))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in read_config(tmp_path)
    assert_same_tensors(NemotronHForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_saving_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    model = tiny_model(hybrid_override_pattern="-")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="a directory is needed"):
        model.save_pretrained(tmp_path / "file")
    for size in ("many", "5XB", -1, 0, "", "GB"):
        with pytest.raises(InputError, match="max_shard_size"):
            model.save_pretrained(tmp_path / "new", max_shard_size=size)
    for refused in ({"variant": "fp16"}, {"distributed_checkpoint": True}, {"safe_serialization": False}):
        with pytest.raises(UnsupportedError):
            model.save_pretrained(tmp_path / "new", **refused)
    with pytest.raises(CheckpointError, match="on the meta device"):
        model.to("meta").save_pretrained(tmp_path / "new")
    assert (tmp_path / "file").read_text() == "kept"
    assert not list((tmp_path / "new").glob("*")), "nothing half-written stays"
