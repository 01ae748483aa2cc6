"""Keys that are no fields: kept and warned about once, or without any effect where they could reach code."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import write_config

from nemotron_h import NemotronHConfig, configuration
from nemotron_h.errors import ConfigError

# Keys through which transformers would import code, fetch something, read another file or change its own machinery.
REACHING = {
    "auto_map": {"AutoConfig": "configuration_evil.EvilConfig", "AutoModel": "org/repo--modeling_evil.Evil"},
    "trust_remote_code": True,
    "_attn_implementation": "org/kernel",
    "_attn_implementation_internal": "org/kernel",
    "_experts_implementation": "org/kernel",
    "_experts_implementation_internal": "org/kernel",
    "experts_implementation": "org/kernel",
    "fusion_config": {"patch_embeddings": True},
    "transformers_weights": "../evil.safetensors",
    "configuration_files": ["config.4.0.0.json"],
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    "custom_generate": "org/repo",
    "kernel_config": {"RMSNorm": "org/kernel"},
    "use_kernels": True,
    "extra_files": ["../evil.safetensors"],
    "base_model_tp_plan": {"layers.*": "colwise"},
    "attribute_map": {"hidden_size": "vocab_size"},
    "sub_configs": {"text_config": "evil"},
    "distributed_config": {"tp_size": 2},
    "per_layer_attributes": ["hidden_size"],
    "is_causal": False,
    "text_config": {"hidden_size": 1},
    "decoder": {"hidden_size": 1},
    "generator": {"hidden_size": 1},
    "text_encoder": {"hidden_size": 1},
    "encoder": {"hidden_size": 1},
    "rope_scaling": "longrope",
    "rope_parameters": {"rope_type": "yarn"},
    "validate": None,
    "to_dict": 5,
    "save_pretrained": "x",
    "layer": [],
    "use_return_dict": True,
    "get_text_config": {},
    "__class__": "dict",
    "__dict__": {},
}


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "_warned", set())


@pytest.fixture(params=["keywords", "file", "override"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return {
        "keywords": lambda keys: NemotronHConfig(**keys),
        "file": lambda keys: NemotronHConfig.from_pretrained(write_config(tmp_path, keys)),
        "override": lambda keys: NemotronHConfig.from_pretrained(write_config(tmp_path, {}), **keys),
    }[request.param]


@pytest.mark.parametrize("key", REACHING)
def test_key_that_reaches_code_does_nothing(key: str, read: Any) -> None:
    config, plain = read({key: REACHING[key]}), NemotronHConfig()
    assert config == plain
    assert config.to_json_string() == plain.to_json_string()
    assert config.__dict__.get(key) == plain.__dict__.get(key)
    assert vars(type(config)) == vars(NemotronHConfig)
    config.validate()
    assert config.get_text_config() is config
    assert (config.layer(0).block_type, config.hidden_size, config._attn_implementation) == ("mamba", 4096, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "mystery"}),
        ("quantization_config", {"quant_method": ["fp8"]}),
        ("quantization_config", {}),
        ("quantization_config", "fp8"),
        ("quantization_config", 4),
        ("per_layer_config", {"0": {"hidden_size": 5}}),
        ("dtype", "zz"),
        ("dtype", "load"),
        ("dtype", "int8"),
        ("torch_dtype", "float8_e4m3fn"),
        ("torch_dtype", ["float32"]),
        ("dtype", 5),
        ("dtype", torch.int64),
        ("id2label", 3),
        ("id2label", {"a": "b"}),
        ("id2label", {"²": "b"}),
        ("id2label", {"1" * 5000: "b"}),
        ("label2id", 3),
        ("num_labels", "a"),
        ("num_labels", -1),
        ("num_labels", True),
        ("num_labels", 2**31),
        ("output_hidden_states", "yes"),
        ("output_attentions", 1),
        ("return_dict", 0),
        ("is_encoder_decoder", True),
        ("problem_type", "mystery"),
        ("problem_type", 5),
        ("architectures", 5),
        ("architectures", [5]),
        ("model_type", "llama"),
        ("model_type", 5),
        ("model_type", ["nemotron_h"]),
    ],
)
def test_bad_value_of_a_key_of_transformers(key: str, value: Any, read: Any) -> None:
    try:
        with pytest.raises(ConfigError, match=key) as error:
            read({key: value})
    except TypeError:  # torch.int64 is no JSON
        assert value is torch.int64
        return
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"), [("dtype", "zz"), ("id2label", 3), ("num_labels", "a"), ("attn_implementation", "org/kernel")]
)
def test_bad_value_of_a_key_of_transformers_assigned(key: str, value: Any) -> None:
    config = NemotronHConfig()
    with pytest.raises(ConfigError, match=key):
        setattr(config, key, value)
    assert config == NemotronHConfig()


def test_one_label_is_no_classification(read: Any) -> None:
    with pytest.raises(ConfigError, match=r"problem_type.*num_labels"):
        read({"problem_type": "single_label_classification", "num_labels": 1})
    assert read({"problem_type": "single_label_classification", "num_labels": 3}).id2label[2] == "LABEL_2"


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors", "fp8", "nvfp4"])
def test_known_quantization_is_kept(method: str, read: Any) -> None:
    assert read({"quantization_config": {"quant_method": method}}).quantization_config == {"quant_method": method}


@pytest.mark.parametrize("value", ["org/kernel", "flash_attention_2", {"": "org/kernel"}, ["sdpa"]])
def test_foreign_attention(value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file's wish is ignored with one warning; who asks for it in a call is told."""
    keys = {"attn_implementation": value}
    for config in (NemotronHConfig.from_pretrained(write_config(tmp_path, keys)), NemotronHConfig.from_dict(keys)):
        assert config._attn_implementation is None
        assert "attn_implementation" not in config.to_dict()
    assert [record.message for record in caplog.records if "ignored" in record.message] == [caplog.records[0].message]
    with pytest.raises(ConfigError, match="attn_implementation"):
        NemotronHConfig(**keys)
    with pytest.raises(ConfigError, match="attn_implementation"):
        NemotronHConfig.from_pretrained(write_config(tmp_path, {}), **keys)


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_known_attention_is_kept(value: str, read: Any) -> None:
    assert read({"attn_implementation": value})._attn_implementation == value


def test_unknown_key_is_kept_and_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = {"deep": [1, None]}
    for _ in range(3):
        config = NemotronHConfig(zoo_animals=value)
    assert [(r.name, r.levelno) for r in caplog.records] == [("nemotron_h", logging.WARNING)]
    assert "zoo_animals" in caplog.text
    assert config.zoo_animals == value
    config.save_pretrained(tmp_path)
    assert NemotronHConfig.from_pretrained(tmp_path).zoo_animals == value
    assert len(caplog.records) == 1
    NemotronHConfig(another_zoo=1)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor", "time_step_rank"])
def test_published_key_without_meaning_is_kept_silently(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = NemotronHConfig(**{key: 512})
    config.save_pretrained(tmp_path)
    assert getattr(NemotronHConfig.from_pretrained(tmp_path), key) == 512
    assert not caplog.records


@pytest.mark.parametrize("key", ["temperature", "top_p", "num_beams", "max_length"])
def test_generation_parameter_is_dropped_aloud(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = NemotronHConfig(**{key: 3})
    assert key not in config.__dict__
    assert key in caplog.text
    assert "generation_config" in caplog.text
    config.save_pretrained(tmp_path)


@pytest.mark.parametrize("key", [5, None, 1.5, ("a",)])
def test_key_that_is_no_name(key: Any) -> None:
    with pytest.raises(ConfigError, match="name of a field"):
        NemotronHConfig.from_dict({key: 1})
    with pytest.raises(ConfigError, match="name of a field"):
        NemotronHConfig(block_configs=[{"block_type": "moe", key: 1}])


def test_num_hidden_layers_follows_the_list() -> None:
    config = NemotronHConfig()
    config.num_hidden_layers = 4
    with pytest.raises(ConfigError, match="layers_block_type"):
        config.num_hidden_layers = 5
    config.hybrid_override_pattern = "M*"
    assert config.num_hidden_layers == 2
    config.update({"layer_types": ["full_attention"], "hidden_size": 32})
    assert (config.layers_block_type, config.hidden_size) == (["attention"], 32)
    with pytest.raises(ConfigError, match="hidden_size=-5"):
        config.update_from_string("hidden_size=-5")


def test_unknown_key_must_be_storable() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in (3 + 4j, object(), {"a": [b"x"]}, circle, {1j: 2}):
        for make in (NemotronHConfig.from_dict, lambda keys: NemotronHConfig(**keys)):
            with pytest.raises(ConfigError, match=r"unknown field 'mine'.*config\.json"):
                make({"mine": value})
    assert NemotronHConfig(mine=[1, {"a": None}]).mine == [1, {"a": None}]
