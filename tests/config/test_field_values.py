"""Every field against every kind of bad value: `ConfigError` that names the field, and nothing else, on every path."""

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from config_cases import legal_configs, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import ConfigError

# What each field accepts, written down independently of the field table.
KINDS = {
    "size": "vocab_size hidden_size max_position_embeddings num_attention_heads ssm_state_size mamba_n_groups"
    " mamba_head_dim mamba_d_conv mamba_expand mamba_chunk_size n_routed_experts moe_intermediate_size"
    " num_experts_per_tok n_group topk_group mtp_loss_depths",
    "size or None": "num_key_value_heads head_dim sliding_window mamba_num_heads moe_latent_size",
    "count": "n_shared_experts moe_shared_expert_intermediate_size num_nextn_predict_layers",
    "count or None": "num_logits_to_keep pad_token_id bos_token_id eos_token_id",
    "flag": "tie_word_embeddings use_cache use_bias residual_in_fp32 rescale_prenorm_residual attention_bias mlp_bias"
    " use_mamba_kernels mamba_conv_bias mamba_proj_bias moe_shared_expert_overlap norm_topk_prob output_router_logits",
    "probability": "hidden_dropout attention_dropout",
    "epsilon": "layer_norm_epsilon",
    "positive": "mamba_dt_min mamba_dt_max",
    "scale": "initializer_range mamba_dt_init_floor router_aux_loss_coef router_z_loss_coef mtp_loss_coef",
    "factor": "routed_scaling_factor",
    "name": "mlp_hidden_act mamba_hidden_act mamba_ssm_cache_dtype",
    "sizes": "intermediate_size",
    "interval": "mamba_dt_limit",
    "blocks or None": "layers_block_type mtp_layers_block_type",
    "block dicts or None": "block_configs mtp_block_configs",
}
FIELD_KINDS = {name: kind for kind, names in KINDS.items() for name in names.split()}

BAD = [
    None, True, -1, 0, 1.5, math.nan, math.inf, -math.inf, 2**31, 2**63, -(2**63), 10**400, 10**5000, 1e308, -1e308,
    "5", "", "hidden", b"5", [], {}, (), [[]], [None], [-1], [True], ["5"], [{}], [{"block_type": []}], {5: 6}, 3 + 4j,
    object(), {"__float__": []}, {"__float__": "NaN"}, [0.0], [2.0, 1.0], [-1.0, 1.0], [math.nan, 1.0],
    [0.0, math.nan], [math.inf, math.inf], [0.0, 1.0, 2.0], [True, 2.0], ["mamba", "mystery"], ["mamba", 5],
    [{"block_type": "mystery"}],
]  # fmt: skip
# Which of them a kind accepts, by identity of type and value.
ACCEPTED: dict[str, list[Any]] = {
    "size": [],
    "size or None": [None],
    "count": [0],
    "count or None": [None, 0],
    "flag": [True],
    "probability": [0],
    "epsilon": [],
    "positive": [1.5],
    "scale": [0, 1.5],
    "factor": [0, 1.5, -1],
    "name": [],
    "sizes": [],
    "interval": [],
    "blocks or None": [None],
    "block dicts or None": [None],
}
DERIVED = {"num_key_value_heads", "head_dim", "mamba_num_heads"}


def bad_values(name: str) -> Iterator[Any]:
    accepted = ACCEPTED[FIELD_KINDS[name]]
    for value in BAD:
        if not any(type(value) is type(legal) and value == legal for legal in accepted):
            yield value


def refused(make: Callable[[], object], name: str, value: Any) -> None:
    try:
        made = make()
    except ConfigError as caught:
        error = caught
    else:
        pytest.fail(f"{name} accepted a {type(value).__name__}: {getattr(made, name, None)}")
    assert type(error) is ConfigError
    message = str(error)
    assert name in message, f"{message!r} does not name {name}"
    assert len(message) < 400
    assert "\n" not in message


def test_every_field_has_a_kind() -> None:
    assert set(FIELD_KINDS) == set(family.FIELDS)
    assert set(ACCEPTED) == set(KINDS)


@pytest.mark.parametrize("name", FIELD_KINDS)
def test_bad_value_is_refused_by_name(name: str) -> None:
    config = NemotronHConfig()
    for value in bad_values(name):
        refused(lambda value=value: NemotronHConfig(**{name: value}), name, value)
        refused(lambda value=value: family.describe({name: value}), name, value)
        refused(lambda value=value: NemotronHConfig.from_dict({"hidden_size": 64}, **{name: value}), name, value)
        refused(lambda value=value: setattr(config, name, value), name, value)
        refused(lambda value=value: NemotronHConfig.preset("nemotron-h-8b", **{name: value}), name, value)
    assert config == NemotronHConfig()


@pytest.mark.parametrize("name", FIELD_KINDS)
def test_accepted_values_are_accepted(name: str) -> None:
    """The tables above would hide a field that refuses too much."""
    for value in ACCEPTED[FIELD_KINDS[name]]:
        partner = {"mamba_dt_min": {"mamba_dt_max": 2}}.get(name, {})
        read = getattr(NemotronHConfig(**{name: value}, **partner), name)
        assert read == value or (value is None and read is not None)


@pytest.mark.parametrize("alias", family.ALIASES)
def test_bad_value_under_another_spelling(alias: str) -> None:
    name = family.ALIASES[alias]
    for value in bad_values(name):
        refused(lambda value=value: NemotronHConfig(**{alias: value}), name, value)
        refused(lambda value=value: setattr(NemotronHConfig(), alias, value), name, value)


@pytest.mark.parametrize("name", FIELD_KINDS)
def test_bad_value_in_a_file(name: str, tmp_path: Path) -> None:
    for value in bad_values(name):
        try:
            text = json.dumps({name: value})
        except (TypeError, ValueError):
            continue  # no JSON: it cannot arrive this way
        directory = write_config(tmp_path, text)
        # A number of 400 digits is refused when the file is parsed, which cannot know the field.
        refused(lambda directory=directory: NemotronHConfig.from_pretrained(directory), name[: 64 - len(text)], value)
        (tmp_path / "config.json").write_text('{"hidden_size": 64}')
        refused(lambda value=value: NemotronHConfig.from_pretrained(tmp_path, **{name: value}), name, value)


def test_a_value_too_deep_to_print_is_refused_by_name() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for name in FIELD_KINDS:
        refused(lambda name=name: NemotronHConfig(**{name: deep}), name, deep)


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_none_is_derived_only_at_construction(name: str) -> None:
    config = NemotronHConfig()
    setattr(config, name, None)
    with pytest.raises(ConfigError, match=name):
        config.validate()
    assert getattr(NemotronHConfig.from_dict(NemotronHConfig().to_dict(), **{name: None}), name) > 0


@pytest.mark.parametrize(
    ("name", "legal", "illegal"),
    [
        ("mamba_d_conv", [1, 64], [65]),
        ("mamba_chunk_size", [1, 2**20], [2**20 + 1]),
        ("num_nextn_predict_layers", [0, 64], [65]),
        ("hidden_dropout", [0.999], [1, 1.0]),
        ("attention_dropout", [0.999], [1, 1.0]),
        ("layer_norm_epsilon", [1e-30, 1], [0, 0.0, 1.001]),
        ("mamba_dt_min", [1e-9], [0, 0.0]),
        ("mamba_dt_max", [1e6], [0, 1.1e6]),
        ("initializer_range", [0, 1000], [1000.5]),
        ("routed_scaling_factor", [-1e6, 1e6], [-1.1e6, 1.1e6]),
        ("hidden_size", [1, 2**31 - 1], [2**31]),
        ("eos_token_id", [[2, 11], 0], [[2, None], [2, -1], [2, 2.0]]),
        ("intermediate_size", [1, [8]], [[8, 0], [8.0]]),
    ],
)
def test_bounds(name: str, legal: list[Any], illegal: list[Any]) -> None:
    for value in legal:
        setattr(NemotronHConfig(), name, value)
    for value in illegal:
        refused(lambda value=value: setattr(NemotronHConfig(), name, value), name, value)


bad = st.integers(0, len(BAD) - 1).map(lambda index: BAD[index])  # not sampled_from: one of them cannot be printed
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | bad,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from([*family.FIELDS, *family.ALIASES, "hybrid_override_pattern", "layer_types", "num_hidden_layers"])


@settings(max_examples=300)
@given(legal_configs(), st.dictionaries(keys | st.text(max_size=12), anything, max_size=4))
def test_anything_is_a_config_or_a_config_error(kwargs: dict[str, Any], changes: dict[str, Any]) -> None:
    for make in (NemotronHConfig.from_dict, family.describe):
        try:
            config = make(kwargs | changes)
        except ConfigError:
            continue
        family.check(config)


@pytest.mark.campaign
def test_a_million_changed_fields_raise_only_config_errors() -> None:
    generator = random.Random(0)
    names, values = [*family.FIELDS, *family.ALIASES], [*BAD, 1, 2, 3, 8, 0.5, "M*", ["mamba"], False]
    for _ in range(1_000_000):
        changes = {generator.choice(names): generator.choice(values) for _ in range(generator.randint(1, 4))}
        try:
            config = family.describe(changes)
        except ConfigError:
            continue
        family.count(config)
