"""Every published spelling of a field is read, from keywords, a dict and a file; two that disagree are an error."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import puzzle_config, write_config

from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import ConfigError

# field, other spelling, a value that is not the default
ALIASES = [
    ("mamba_n_groups", "n_groups", 4),
    ("mamba_d_conv", "conv_kernel", 3),
    ("mamba_expand", "expand", 3),
    ("mamba_dt_min", "time_step_min", 0.002),
    ("mamba_dt_max", "time_step_max", 0.2),
    ("mamba_dt_limit", "time_step_limit", (0.25, 0.5)),
    ("mamba_dt_init_floor", "time_step_floor", 0.0002),
    ("mamba_conv_bias", "use_conv_bias", False),
    ("mamba_chunk_size", "chunk_size", 64),
    ("head_dim", "attention_head_dim", 32),
    ("layer_norm_epsilon", "norm_eps", 1e-4),
    ("layer_norm_epsilon", "rms_norm_eps", 1e-4),
    ("n_routed_experts", "num_experts", 16),
    ("n_routed_experts", "num_local_experts", 16),
]
BLOCKS = ["mamba", "mlp", "attention", "moe", "mamba"]
LAYERS = [
    ("layers_block_type", BLOCKS),
    ("layers_block_type", ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"]),
    ("layer_types", BLOCKS),
    ("layer_types", ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"]),
    ("hybrid_override_pattern", "M-*EM"),
    ("block_configs", [{"block_type": name} for name in BLOCKS]),
]
HEADS = [
    ("mtp_layers_block_type", ["attention", "mamba", "moe"]),
    ("mtp_layers_block_type", ["full_attention", "linear_attention", "moe"]),
    ("mtp_hybrid_override_pattern", "*ME"),
    ("mtp_block_configs", [{"block_type": "full_attention"}, {"block_type": "mamba"}, {"block_type": "moe"}]),
]
INFINITE = ["[0.0, Infinity]", '[0, {"__float__": "Infinity"}]', "[0.0, 1e308]", "[0.0, 1.797e308]", "[0.0, 1e300]"]

Reader = Callable[[dict[str, Any]], NemotronHConfig]


@pytest.fixture(params=["keywords", "from_dict", "override", "file"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    """The four ways in which keys reach a config."""
    return {
        "keywords": lambda keys: NemotronHConfig(**keys),
        "from_dict": NemotronHConfig.from_dict,
        "override": lambda keys: NemotronHConfig.from_dict({"chunk_size": 256, "mamba_n_groups": 2}, **keys),
        "file": lambda keys: NemotronHConfig.from_pretrained(write_config(tmp_path, keys)),
    }[request.param]


@pytest.mark.parametrize(("name", "alias", "value"), ALIASES)
def test_alias_is_read_as_its_field(name: str, alias: str, value: Any, read: Reader) -> None:
    config = read({alias: value})
    assert getattr(config, name) == value == getattr(config, alias)
    assert read({name: value, alias: value}) == config


@pytest.mark.parametrize(("name", "alias", "value"), ALIASES)
def test_alias_is_set_and_saved_as_its_field(name: str, alias: str, value: Any) -> None:
    config = NemotronHConfig()
    setattr(config, alias, value)
    assert getattr(config, name) == value
    saved, expected = json.loads(config.to_json_string()), list(value) if isinstance(value, tuple) else value
    assert saved[name] == expected
    if not alias.startswith("num_"):
        assert saved[alias] == expected


@pytest.mark.parametrize(("name", "alias", "value"), ALIASES)
def test_two_spellings_that_disagree_are_an_error(name: str, alias: str, value: Any, read: Reader) -> None:
    other = {**family.describe({}).__dict__}[name]
    with pytest.raises(ConfigError) as error:
        read({name: other, alias: value})
    assert name in str(error.value)
    assert alias in str(error.value)


@pytest.mark.parametrize("keys", [("head_dim", "attention_head_dim"), ("attention_head_dim", "head_dim")])
def test_null_beside_a_value_says_nothing(keys: tuple[str, str], read: Reader) -> None:
    assert read({keys[0]: None, keys[1]: 32}).head_dim == 32
    assert read({keys[0]: 32, keys[1]: None}).head_dim == 32


def test_table_covers_every_alias() -> None:
    assert {alias: name for name, alias, _ in ALIASES} == family.ALIASES


@pytest.mark.parametrize(("key", "value"), LAYERS)
def test_layers(key: str, value: Any, read: Reader) -> None:
    config = read({key: value, "num_hidden_layers": 5})
    assert config.layers_block_type == BLOCKS
    assert config.layer_types == ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"]
    assert config.hybrid_override_pattern == "M-*EM"
    assert config.num_hidden_layers == 5
    assert read({key: value}) == config


@pytest.mark.parametrize(("key", "value"), LAYERS)
@pytest.mark.parametrize("other", [{"hybrid_override_pattern": "M*"}, {"layers_block_type": [*BLOCKS, "mlp"]}])
def test_layers_that_disagree_are_an_error(key: str, value: Any, other: dict[str, Any], read: Reader) -> None:
    if key in other:
        other = {"layer_types": ["mamba"]}
    with pytest.raises(ConfigError, match="layers_block_type"):
        read({key: value} | other)


@pytest.mark.parametrize("first", LAYERS)
@pytest.mark.parametrize("second", LAYERS)
def test_layers_that_agree_are_accepted(first: tuple[str, Any], second: tuple[str, Any], read: Reader) -> None:
    assert read(dict([first, second])).layers_block_type == BLOCKS


@pytest.mark.parametrize(("key", "value"), LAYERS)
@pytest.mark.parametrize("count", [4, 6, 0, "5", 5.0, True])
def test_num_hidden_layers_must_be_the_number_of_layers(key: str, value: Any, count: Any, read: Reader) -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        read({key: value, "num_hidden_layers": count})


@pytest.mark.parametrize(("key", "value"), HEADS)
def test_mtp_layers(key: str, value: Any, read: Reader) -> None:
    config = read({key: value, "num_nextn_predict_layers": 1})
    assert config.mtp_layers_block_type == ["attention", "mamba", "moe"]
    assert config.mtp_hybrid_override_pattern == "*ME"
    disagreeing = {"mtp_layers_block_type": ["moe"]} if "pattern" in key else {"mtp_hybrid_override_pattern": "E"}
    with pytest.raises(ConfigError, match="mtp_layers_block_type"):
        read({key: value} | disagreeing)


def test_none_means_the_default_layers(read: Reader) -> None:
    config = read({"layers_block_type": None, "mtp_layers_block_type": None, "num_hidden_layers": None})
    assert config.layers_block_type == ["mamba", "moe", "attention", "mlp"]
    assert config.mtp_layers_block_type == ["attention", "moe"]


def test_derived_sizes(read: Reader) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "mamba_expand": 3, "mamba_head_dim": 12}
    config = read(sizes | {"head_dim": None, "num_key_value_heads": None, "mamba_num_heads": None})
    assert (config.head_dim, config.num_key_value_heads, config.mamba_num_heads) == (16, 6, 24)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"hidden_size": 100, "num_attention_heads": 6, "head_dim": None}, ("head_dim", "num_attention_heads")),
        ({"hidden_size": 9, "mamba_head_dim": 8, "mamba_num_heads": None}, ("mamba_num_heads", "mamba_head_dim")),
    ],
)
def test_sizes_that_cannot_be_derived_are_an_error(sizes: dict[str, Any], named: tuple[str, str], read: Reader) -> None:
    with pytest.raises(ConfigError) as error:
        read(sizes)
    assert all(name in str(error.value) for name in (*named, "hidden_size"))


@pytest.mark.parametrize("name", ["mamba_dt_limit", "time_step_limit"])
@pytest.mark.parametrize("text", INFINITE)
def test_infinite_dt_limit(name: str, text: str, tmp_path: Path) -> None:
    config = NemotronHConfig.from_pretrained(write_config(tmp_path, f'{{"{name}": {text}}}'))
    assert config.mamba_dt_limit == (0.0, math.inf)
    assert NemotronHConfig(**{name: json.loads(text)}) == config == NemotronHConfig()
    assert json.loads(config.to_json_string())["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


@pytest.mark.parametrize("value", [[0.001, 0.1], (0, 1), [0.0, 1e299], [2, 2]])
def test_finite_dt_limit(value: Any, read: Reader) -> None:
    assert read({"time_step_limit": value}).mamba_dt_limit == tuple(value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_dtype(key: str, name: str, read: Reader) -> None:
    config = read({key: name})
    assert config.dtype == getattr(torch, name)
    assert read({"dtype": name, "torch_dtype": name}).dtype == config.dtype
    with pytest.raises(ConfigError, match=r"torch_dtype.* dtype"):
        read({"torch_dtype": name, "dtype": "float32" if name != "float32" else "bfloat16"})


def test_dtype_objects_and_auto(tmp_path: Path) -> None:
    directory = write_config(tmp_path, {"torch_dtype": "bfloat16"})
    assert NemotronHConfig.from_pretrained(directory, dtype="auto").dtype == torch.bfloat16
    assert NemotronHConfig.from_pretrained(directory, dtype=torch.float64, torch_dtype=None).dtype == torch.float64
    assert NemotronHConfig(mamba_ssm_cache_dtype=torch.bfloat16).mamba_ssm_cache_dtype == "bfloat16"


@pytest.mark.parametrize("value", [0, 1])
def test_integers_become_real_numbers(value: int) -> None:
    """transformers' own class refuses `"time_step_max": 1` in a file that we save."""
    config = NemotronHConfig(router_aux_loss_coef=value, mamba_dt_max=1, mamba_dt_limit=(value, 1))
    kept = [config.router_aux_loss_coef, config.mamba_dt_max, *config.mamba_dt_limit]
    assert [type(number) for number in kept] == [float] * 4


def test_puzzle(read: Reader, caplog: pytest.LogCaptureFixture) -> None:
    config = read(puzzle_config())
    assert config.hybrid_override_pattern.count("M") == config.hybrid_override_pattern.count("E") == 40
    assert config.mtp_layers_block_type == ["attention", "moe"]
    first, last, mamba = config.layer(1), config.layer(87), config.layer(0)
    assert (first.moe_intermediate_size, first.num_experts_per_tok, first.n_routed_experts) == (1344, 5, 512)
    assert (last.moe_intermediate_size, last.moe_latent_size) == (1280 + 64 * (87 % 23), 1024)
    assert (mamba.block_type, mamba.moe_intermediate_size) == ("mamba", config.moe_intermediate_size)
    assert config.mtp_layer(1).num_experts_per_tok == 22
    assert not [record for record in caplog.records if "nemotron_h_puzzle" in record.message]


def test_block_configs_in_other_words() -> None:
    """null means absent where None is no value; `num_experts` is `n_routed_experts`."""
    blocks = [
        {"block_type": "linear_attention", "moe_intermediate_size": None, "num_experts_per_tok": None},
        {"block_type": "moe", "num_experts": 32, "moe_latent_size": None, "moe_intermediate_size": 5},
    ]
    config = NemotronHConfig(block_configs=blocks, moe_latent_size=16)
    assert config.block_configs == [{"block_type": "mamba"}, {"n_routed_experts": 32} | _without_experts(blocks[1])]
    assert (config.layer(1).n_routed_experts, config.layer(1).moe_latent_size) == (32, None)
    assert config.layer(0).moe_latent_size == 16
    with pytest.raises(ConfigError, match="n_routed_experts"):
        NemotronHConfig(block_configs=[{"block_type": "moe", "num_experts": 32, "n_routed_experts": 16}])


def _without_experts(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "num_experts"}


def test_intermediate_sizes_per_layer() -> None:
    config = NemotronHConfig(hybrid_override_pattern="MM-M-", intermediate_size=(8, 16))
    assert config.intermediate_size == [8, 16]
    assert [config.layer(index).intermediate_size for index in (2, 4)] == [8, 16]


def test_language_model_of_a_multimodal_config(tmp_path: Path) -> None:
    nested = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*", "hidden_size": 64}
    outer = {"model_type": "some_vision_model", "vision_config": {"model_type": "vit"}, "llm_config": nested}
    assert NemotronHConfig.from_dict(outer) == NemotronHConfig(**nested)
    assert NemotronHConfig.from_pretrained(write_config(tmp_path, outer)) == NemotronHConfig(**nested)
