"""A saved config is read back equal: by us, and by transformers' own class; other readers find their keys."""

import copy
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import COMPLETE, legal_configs, puzzle_config, savable
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as TransformersConfig

from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import ConfigError

PEER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
OURS_ONLY = {
    "block_configs", "mtp_block_configs", "mtp_loss_coef", "mtp_loss_depths", "router_aux_loss_coef",
    "router_z_loss_coef",
}  # fmt: skip


def saved(config: NemotronHConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string())


@given(legal_configs())
def test_save_and_load_is_the_identity(kwargs: dict[str, Any]) -> None:
    config = NemotronHConfig(**savable(kwargs), dtype="bfloat16", my_note=["kept"])
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        loaded = NemotronHConfig.from_pretrained(directory)
    assert loaded == config
    assert {name: getattr(loaded, name) for name in family.FIELDS} == {n: getattr(config, n) for n in family.FIELDS}
    assert (loaded.dtype, loaded.my_note) == (torch.bfloat16, ["kept"])


@given(legal_configs())
def test_every_field_is_read_as_given(kwargs: dict[str, Any]) -> None:
    config = NemotronHConfig(**kwargs)
    assert set(kwargs) == set(family.FIELDS)
    assert {name: getattr(config, name) for name in kwargs} == kwargs
    described = family.describe(kwargs)
    assert {name: getattr(described, name) for name in kwargs} == kwargs


@given(legal_configs())
def test_dict_and_copies_are_equal(kwargs: dict[str, Any]) -> None:
    config = NemotronHConfig(**kwargs)
    assert NemotronHConfig.from_dict(config.to_dict()) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@given(legal_configs(), legal_configs(), st.sampled_from(sorted(family.FIELDS)))
def test_configs_differ_when_one_field_does(first: dict[str, Any], second: dict[str, Any], name: str) -> None:
    config, other = NemotronHConfig(**first), NemotronHConfig(**first)
    setattr(other, name, second[name])
    assert (config == other) == (first[name] == second[name])


@given(legal_configs())
def test_transformers_reads_the_same_values(kwargs: dict[str, Any]) -> None:
    kwargs = savable(kwargs)
    for name in OURS_ONLY & set(kwargs):
        del kwargs[name]
    kwargs["num_logits_to_keep"] = kwargs["num_logits_to_keep"] or 0  # their class has no None here
    if isinstance(kwargs["intermediate_size"], list):  # nor a list here
        kwargs["intermediate_size"] = 7
    with tempfile.TemporaryDirectory() as directory:
        NemotronHConfig(**kwargs).save_pretrained(directory)
        peer = TransformersConfig.from_pretrained(directory)
    for name, value in kwargs.items():
        read = getattr(peer, PEER_NAMES.get(name, name))
        if name.endswith("layers_block_type"):
            value = [family.BLOCKS[block].layer_type for block in value]
        assert (tuple(read) if isinstance(value, tuple) else read) == value, name


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_published_config_round_trips(path: Path, tmp_path: Path) -> None:
    config = NemotronHConfig.from_pretrained(str(path))
    config.save_pretrained(tmp_path)
    assert NemotronHConfig.from_pretrained(tmp_path) == config
    peer = TransformersConfig.from_pretrained(tmp_path)
    assert peer.layers_block_type == config.layer_types
    assert (peer.hidden_size, peer.n_groups, peer.dtype) == (config.hidden_size, config.mamba_n_groups, config.dtype)


def test_puzzle_round_trips(tmp_path: Path) -> None:
    config = NemotronHConfig(**puzzle_config())
    config.save_pretrained(tmp_path)
    loaded = NemotronHConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert [loaded.layer(i) for i in range(88)] == [config.layer(i) for i in range(88)]


@pytest.mark.parametrize("pattern", ["M*E-", "M*-", "E", "M"])
def test_other_readers_find_their_keys(pattern: str) -> None:
    """llama.cpp's converter, MLX and vLLM read the hub's names, SGLang `mamba_n_groups`, all the pattern."""
    config = NemotronHConfig(hybrid_override_pattern=pattern, n_groups=4, conv_kernel=3, use_conv_bias=False)
    keys = saved(config)
    assert keys["hybrid_override_pattern"] == pattern
    assert keys["num_hidden_layers"] == len(pattern)
    assert keys["layers_block_type"] == config.layers_block_type
    assert (keys["n_groups"], keys["mamba_n_groups"], keys["conv_kernel"], keys["use_conv_bias"]) == (4, 4, 3, False)
    assert keys["model_type"] == "nemotron_h"
    assert {"chunk_size", "expand", "norm_eps", "time_step_min", "time_step_max", "time_step_floor"} <= set(keys)
    assert not {"num_experts", "num_local_experts"} & set(keys), "no published config of the family has them"
    assert ("num_experts_per_tok" in keys) == ("E" in pattern)
    assert ("E" in pattern) or not set(family.MOE_FIELDS) & set(keys)


def test_experts_of_an_mtp_head_are_saved() -> None:
    config = NemotronHConfig(hybrid_override_pattern="M", num_nextn_predict_layers=1, n_routed_experts=16)
    keys = saved(config)
    assert (keys["n_routed_experts"], keys["mtp_hybrid_override_pattern"]) == (16, "*E")
    assert "mtp_hybrid_override_pattern" not in saved(NemotronHConfig())


def test_saving_checks_the_rules(tmp_path: Path) -> None:
    config = NemotronHConfig()
    config.mamba_n_groups = 7
    with pytest.raises(ConfigError, match="mamba_n_groups"):
        config.save_pretrained(tmp_path)
    config.mamba_n_groups = 8
    config.layers_block_type.append("mystery")
    with pytest.raises(ConfigError, match="layers_block_type"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_configs_share_no_lists() -> None:
    first = NemotronHConfig()
    first.layers_block_type.append("mlp")
    first.mtp_layers_block_type.append("mlp")
    assert NemotronHConfig().layers_block_type == ["mamba", "moe", "attention", "mlp"]
    assert NemotronHConfig().mtp_layers_block_type == ["attention", "moe"] == family.describe({}).mtp_layers_block_type
