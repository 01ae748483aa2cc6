"""What a legal configuration is: the table's rule for each field, then every rule between fields."""

from __future__ import annotations

import difflib
from types import SimpleNamespace
from typing import Any

from nemotron_h.errors import ConfigError
from nemotron_h.family.fields import FIELDS, integer, short

_DERIVED = ("num_key_value_heads", "head_dim", "mamba_num_heads")
_PER_LAYER = {
    "moe_intermediate_size": integer(1),
    "n_routed_experts": integer(1),
    "num_experts_per_tok": integer(1),
    "moe_latent_size": integer(1, optional=True),
    "moe_shared_expert_intermediate_size": integer(0),
    "intermediate_size": integer(1),
    "sliding_window": integer(1, optional=True),
}


def check_field(name: str, value: Any) -> None:
    """Raise `ConfigError` when `value` breaks the rule of field `name`."""
    rule = FIELDS[name].rule(value)
    if rule is not None:
        raise ConfigError(f"{name}={short(value)}: must be {rule}")


def check(config: Any) -> None:
    """Raise `ConfigError`, naming field, value and rule, unless `config` is legal.

    `config` is anything with the table's fields as attributes (`NemotronHConfig`, `SimpleNamespace`).
    """
    for name in FIELDS:
        check_field(name, getattr(config, name))
    for name in _DERIVED:
        if getattr(config, name) is None:
            _fail(f"{name}=None", "means its derived value only when a config is constructed; assign the number")
    _check_mamba(config)
    _check_attention(config)
    _check_routing(config, config, "")
    _check_lists(config)


def _check_mamba(config: Any) -> None:
    _divides("mamba_n_groups", config.mamba_n_groups, "mamba_num_heads", config.mamba_num_heads)
    if config.mamba_dt_min > config.mamba_dt_max:
        _fail(f"mamba_dt_min={config.mamba_dt_min}", f"must not exceed mamba_dt_max={config.mamba_dt_max}")


def _check_attention(config: Any) -> None:
    _divides("num_key_value_heads", config.num_key_value_heads, "num_attention_heads", config.num_attention_heads)


def _check_routing(config: Any, layer: Any, where: str) -> None:
    experts, groups = layer.n_routed_experts, config.n_group
    _divides("n_group", groups, f"{where}n_routed_experts", experts)
    if config.topk_group > groups:
        _fail(f"topk_group={config.topk_group}", f"must not exceed n_group={groups}")
    allowed = experts // groups * config.topk_group
    if layer.num_experts_per_tok > allowed:
        rule = f"must not exceed {allowed}, for topk_group={config.topk_group} of n_group={groups} groups"
        rule += f" of {where}n_routed_experts={experts}"
        _fail(f"{where}num_experts_per_tok={layer.num_experts_per_tok}", rule)


def _check_lists(config: Any) -> None:
    mlps = config.layers_block_type.count("mlp")
    widths = config.intermediate_size
    if not isinstance(widths, int) and len(widths) != mlps:
        _fail(f"intermediate_size with {len(widths)} entries", f"must have one per mlp of layers_block_type ({mlps})")
    if not isinstance(widths, int) and "mlp" in config.mtp_layers_block_type and config.num_nextn_predict_layers:
        _fail("intermediate_size as a list", "must be one integer when mtp_layers_block_type has an mlp")
    for name, list_name in (("block_configs", "layers_block_type"), ("mtp_block_configs", "mtp_layers_block_type")):
        configs, types = getattr(config, name), getattr(config, list_name)
        if configs is None:
            continue
        if len(configs) != len(types):
            _fail(f"{name} with {len(configs)} entries", f"must have one per entry of {list_name} ({len(types)})")
        for index, (entry, block_type) in enumerate(zip(configs, types, strict=True)):
            where = f"{name}[{index}]."
            if entry["block_type"] != block_type:
                _fail(f"{where}block_type={entry['block_type']!r}", f"must be {block_type!r}, as in {list_name}")
            _check_entry(config, where, entry)


def _check_entry(config: Any, where: str, entry: dict[str, Any]) -> None:
    for name, value in entry.items():
        if name in _PER_LAYER:
            rule = _PER_LAYER[name](value)
            if rule is not None:
                _fail(f"{where}{name}={short(value)}", f"must be {rule}")
        elif close := difflib.get_close_matches(name, _PER_LAYER, n=1, cutoff=0.88):
            _fail(f"{where}{name}", f"unknown; did you mean {close[0]!r}?")
    if entry["block_type"] == "moe":
        _check_routing(config, SimpleNamespace(**{n: entry.get(n, getattr(config, n)) for n in _PER_LAYER}), where)


def _divides(name: str, value: int, of_name: str, of: int) -> None:
    if of % value:
        _fail(f"{name}={value}", f"must divide {of_name}={of}")


def _fail(what: str, rule: str) -> None:
    raise ConfigError(f"{what}: {rule}")
