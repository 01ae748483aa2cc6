"""Every rule between fields, broken once; a test that the table of broken rules misses none."""

import ast
import inspect
import sys
from typing import Any

import pytest

from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import ConfigError
from nemotron_h.family import rules

MOE = {"block_type": "moe"}

# What breaks the rule; what the message must name.
BROKEN: list[tuple[dict[str, Any], list[str]]] = [
    ({"mamba_n_groups": 7}, ["mamba_n_groups=7", "mamba_num_heads=128"]),
    ({"mamba_num_heads": 12}, ["mamba_n_groups=8", "mamba_num_heads=12"]),
    ({"mamba_n_groups": 256}, ["mamba_n_groups=256", "mamba_num_heads=128"]),
    ({"mamba_dt_min": 0.5}, ["mamba_dt_min=0.5", "mamba_dt_max=0.1"]),
    ({"time_step_max": 0.0005}, ["mamba_dt_min=0.001", "mamba_dt_max=0.0005"]),
    ({"num_key_value_heads": 5}, ["num_key_value_heads=5", "num_attention_heads=32"]),
    ({"num_attention_heads": 12}, ["num_key_value_heads=8", "num_attention_heads=12"]),
    ({"num_key_value_heads": 64}, ["num_key_value_heads=64", "num_attention_heads=32"]),
    ({"n_group": 3}, ["n_group=3", "n_routed_experts=8"]),
    ({"topk_group": 2}, ["topk_group=2", "n_group=1"]),
    ({"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "n_routed_experts=8"]),
    ({"n_group": 4, "num_experts_per_tok": 3}, ["num_experts_per_tok=3", "topk_group=1", "n_group=4"]),
    ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 5}, ["num_experts_per_tok=5", "topk_group=2", "n_group=4"]),
    ({"hybrid_override_pattern": "M-", "intermediate_size": [8, 8]}, ["intermediate_size", "layers_block_type"]),
    ({"hybrid_override_pattern": "M", "intermediate_size": [8]}, ["intermediate_size", "layers_block_type"]),
    (
        {"intermediate_size": [8], "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*-"},
        ["intermediate_size", "mtp_layers_block_type"],
    ),
    ({"block_configs": [{**MOE, "n_routed_experts": 1}]}, ["block_configs[0].num_experts_per_tok", "experts=1"]),
    ({"block_configs": [{**MOE, "num_experts_per_tok": 9}]}, ["block_configs[0].num_experts_per_tok=9"]),
    ({"block_configs": [{**MOE, "num_experts": 9}], "n_group": 2}, ["n_group=2", "[0].n_routed_experts=9"]),
    ({"block_configs": [{**MOE, "moe_intermediate_size": 0}]}, ["block_configs[0].moe_intermediate_size=0"]),
    ({"block_configs": [{**MOE, "moe_intermedate_size": 8}]}, ["moe_intermedate_size", "'moe_intermediate_size'"]),
    ({"mtp_block_configs": [{**MOE, "num_experts_per_tok": 9}]}, ["mtp_block_configs[0].num_experts_per_tok=9"]),
]  # fmt: skip

# Rules that only a change after construction can break: constructing derives or refuses these before.
BROKEN_LATER: list[tuple[dict[str, Any], list[str]]] = [
    ({"head_dim": None}, ["head_dim"]),
    ({"block_configs": [MOE]}, ["block_configs", "layers_block_type"]),
    ({"block_configs": [MOE] * 4}, ["block_configs[0].block_type='moe'", "layers_block_type"]),
    ({"mtp_block_configs": [MOE] * 3}, ["mtp_block_configs", "mtp_layers_block_type"]),
    ({"mtp_block_configs": [MOE] * 2}, ["mtp_block_configs[0].block_type='moe'", "mtp_layers_block_type"]),
]


def fails_naming(make: Any, names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    missing = [name for name in names if name not in str(error.value)]
    assert not missing, f"{error.value} does not name {missing}"


def later(changes: dict[str, Any]) -> None:
    config = NemotronHConfig()
    for name, value in changes.items():
        setattr(config, name, value)
    config.validate()


@pytest.mark.parametrize(("changes", "names"), BROKEN, ids=str)
def test_broken_rule_names_both_fields(changes: dict[str, Any], names: list[str]) -> None:
    fails_naming(lambda: NemotronHConfig(**changes), names)
    fails_naming(lambda: family.describe(changes), names)
    fails_naming(lambda: NemotronHConfig.from_dict({"use_cache": False}, **changes), names)
    fails_naming(lambda: NemotronHConfig.from_dict(changes), names)


@pytest.mark.parametrize(("changes", "names"), BROKEN_LATER, ids=str)
def test_rule_broken_after_construction(changes: dict[str, Any], names: list[str]) -> None:
    fails_naming(lambda: later(changes), names)


def test_table_breaks_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of `_fail` in rules.py is reached; with the call removed, one of the tests above would fail."""
    reached: set[int] = set()
    fail = rules._fail

    def record(*arguments: str) -> None:
        frame = sys._getframe(1)
        if frame.f_code is rules._divides.__code__:
            frame = frame.f_back
        reached.add(frame.f_lineno)
        fail(*arguments)

    monkeypatch.setattr(rules, "_fail", record)
    for changes, names in BROKEN:
        fails_naming(lambda changes=changes: NemotronHConfig(**changes), names)
    for changes, names in BROKEN_LATER:
        fails_naming(lambda changes=changes: later(changes), names)
    calls = [
        range(node.lineno, node.end_lineno + 1)
        for function in ast.parse(inspect.getsource(rules)).body
        if isinstance(function, ast.FunctionDef) and function.name != "_divides"
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_fail", "_divides")
    ]
    assert len(calls) >= 12
    assert [lines.start for lines in calls if not reached & set(lines)] == []


# Of one layer in block_configs: the block type that uses it, legal values, illegal ones.
PER_LAYER = {
    "moe_intermediate_size": ("moe", [1, 96], [0, -1, 1.5, True, "8", [8]]),
    "n_routed_experts": ("moe", [2, 64], [0, -2, 2.0, True, "8"]),
    "num_experts_per_tok": ("moe", [1, 8], [0, -1, 2.0, True]),
    "moe_latent_size": ("moe", [1, None], [0, -1, 8.0, True]),
    "moe_shared_expert_intermediate_size": ("moe", [0, 5], [-1, 5.0, True]),
    "intermediate_size": ("mlp", [1, 40], [0, -1, 4.0, True, [4]]),
    "sliding_window": ("attention", [1, None], [0, -1, 4.0, True]),
}


@pytest.mark.parametrize("name", PER_LAYER)
@pytest.mark.parametrize("key", ["block_configs", "mtp_block_configs"])
def test_sizes_of_one_layer(key: str, name: str) -> None:
    block_type, legal, illegal = PER_LAYER[name]
    for value in legal:
        config = NemotronHConfig(
            **{key: [{"block_type": block_type, name: value}]}, moe_latent_size=7, sliding_window=9
        )
        sizes = config.layer(0) if key == "block_configs" else config.mtp_layer(0)
        assert (sizes.block_type, getattr(sizes, name)) == (block_type, value)
    for value in illegal:
        changes = {key: [{"block_type": block_type, name: value}]}
        fails_naming(lambda changes=changes: NemotronHConfig(**changes), [f"{key}[0].{name}={value!r}"])


def test_every_size_of_a_layer_has_a_row() -> None:
    assert {"block_type", *PER_LAYER} == set(family.Layer.__dataclass_fields__)


LEGAL = [
    {"mamba_n_groups": 128},
    {"num_key_value_heads": 32},
    {"mamba_dt_min": 0.1},
    {"num_experts_per_tok": 8},
    {"n_group": 4, "topk_group": 4, "num_experts_per_tok": 8},
    {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    {"hybrid_override_pattern": "M--", "intermediate_size": [8, 16]},
    {"intermediate_size": [8], "mtp_hybrid_override_pattern": "*-"},
    {"block_configs": [{**MOE, "n_routed_experts": 2}, {"block_type": "mamba", "num_experts_per_tok": 99}]},
    {"vocab_size": 1, "hybrid_override_pattern": "M"},
]


@pytest.mark.parametrize("kwargs", LEGAL, ids=str)
def test_just_legal(kwargs: dict[str, Any]) -> None:
    family.check(NemotronHConfig(**kwargs))


TYPO = [
    ("hiden_size", "hidden_size"),
    ("hidden_sise", "hidden_size"),
    ("num_experts_per_token", "num_experts_per_tok"),
    ("mamba_num_head", "mamba_num_heads"),
    ("hybrid_overide_pattern", "hybrid_override_pattern"),
    ("num_hiden_layers", "num_hidden_layers"),
    ("use_convbias", "use_conv_bias"),
    ("n_shared_expert", "n_shared_experts"),
    ("layer_type", "layer_types"),
]


@pytest.mark.parametrize(("typo", "meant"), TYPO)
def test_misspelt_field_gets_a_suggestion(typo: str, meant: str) -> None:
    names = [repr(typo), f"did you mean {meant!r}"]
    fails_naming(lambda: NemotronHConfig(**{typo: 64}), names)
    fails_naming(lambda: NemotronHConfig.from_dict({typo: 64}), names)
    fails_naming(lambda: NemotronHConfig.from_dict({}, **{typo: 64}), names)
    fails_naming(lambda: NemotronHConfig.preset("nemotron-h-8b", **{typo: 64}), names)
    fails_naming(lambda: setattr(NemotronHConfig(), typo, 64), names)
    fails_naming(lambda: family.describe({typo: 64}), names)


def test_every_long_name_is_protected() -> None:
    known = {*family.FIELDS, *family.ALIASES}
    for name in sorted(known):
        typo = name[:3] + name[4:]
        if len(name) >= 9 and typo not in known:
            fails_naming(lambda typo=typo: NemotronHConfig(**{typo: 1}), [repr(typo), "did you mean"])
