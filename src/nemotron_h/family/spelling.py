"""One reader for every spelling of a configuration that is in circulation (hub, transformers 4 and 5, vLLM, Puzzle).

`read` turns keyword arguments into the canonical field values and the rest. It knows no rules about values; those are
`rules.check`'s. Two spellings of one field must agree.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from nemotron_h.errors import ConfigError
from nemotron_h.family import blocks
from nemotron_h.family.fields import ALIASES, FIELDS, short

# Keys of published configs that mean nothing to this model: kept, saved again, and no reason for a warning.
INERT = {
    "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters", "time_step_rank", "quantization_config",
    "torch_dtype", "dtype", "model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "output_hidden_states", "output_attentions", "return_dict", "is_encoder_decoder", "id2label",
    "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "per_layer_config", "gradient_checkpointing",
    "attn_implementation", "is_decoder", "tie_last_hidden_states",
}  # fmt: skip

# Keys through which a config file could name code to import or run (see SECURITY in CONTRIBUTING): never acted upon.
CODE_KEYS = {
    "auto_map", "trust_remote_code", "experts_implementation", "fusion_config", "transformers_weights",
    "configuration_files", "custom_pipelines", "custom_generate", "kernel_config", "use_kernels",
}  # fmt: skip

_PATTERNS = {
    "hybrid_override_pattern": "layers_block_type",
    "layer_types": "layers_block_type",
    "mtp_hybrid_override_pattern": "mtp_layers_block_type",
    "mtp_layer_types": "mtp_layers_block_type",
}
_TYPES_OF = {"block_configs": "layers_block_type", "mtp_block_configs": "mtp_layers_block_type"}

MODEL_TYPES = ("nemotron_h", "nemotron_h_puzzle")


def language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our part of a config.json: multimodal checkpoints nest it one level down."""
    if config.get("model_type") not in (None, *MODEL_TYPES):
        for value in config.values():
            if isinstance(value, Mapping) and value.get("model_type") in MODEL_TYPES:
                return dict(value)
    return dict(config)


def check_model_type(model_type: Any, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a foreign model type, and for Puzzle's without its list of layers."""
    if model_type is not None and model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type={short(model_type)}: this package runs {' and '.join(MODEL_TYPES)} only")
    spellings = ("block_configs", "layers_block_type", "hybrid_override_pattern", "layer_types")
    if model_type == "nemotron_h_puzzle" and all(config.get(name) is None for name in spellings):
        raise ConfigError("model_type='nemotron_h_puzzle' needs block_configs=[one dict per layer]")


def canonical_name(key: str) -> str:
    """The field of the table that `key` is a spelling of; `key` itself when it is none."""
    return ALIASES.get(key) or _PATTERNS.get(key) or key


def read(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into canonical fields and extras.

    Returns:
        `(values, extras)`: `values` holds every field of the table, defaults filled in and derived values
        (heads, head_dim, layer list) resolved; `extras` the other keys, without those that reach code.

    Raises:
        ConfigError: two spellings disagree, or a key looks like a misspelt field.
    """
    _check_keys(kwargs)
    given: dict[str, tuple[str, Any]] = {}
    extras: dict[str, Any] = {}
    count = kwargs.get("num_hidden_layers")
    for key, value in kwargs.items():
        name = canonical_name(key)
        if name in FIELDS:
            _put(given, name, key, decode(name, value))
        elif key == "num_hidden_layers" or key in CODE_KEYS or (key.startswith("_") and key != "_name_or_path"):
            continue
        else:
            refuse_typo(key)
            extras[key] = value
    values = {name: given[name][1] if name in given else field.default for name, field in FIELDS.items()}
    if "mtp_layers_block_type" not in given:
        values["mtp_layers_block_type"] = None  # so that it is not taken for an explicit one beside mtp_block_configs
    _resolve(values, count)
    return values, extras


def _put(given: dict[str, tuple[str, Any]], name: str, key: str, value: Any) -> None:
    if value is None and name in given:
        return
    if name in given and given[name][1] is not None and not _same(given[name][1], value):
        other, old = given[name]
        raise ConfigError(
            f"{key}={short(value)} and {other}={short(old)} are two spellings of {name} and disagree; give one"
        )
    given[name] = (key, value)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b or (isinstance(a, int | float) and isinstance(b, int | float) and a == b)


def decode(name: str, value: Any) -> Any:
    """One value in the form in which the config keeps it: pattern strings become lists, 1e308 infinity, 0 here 0.0."""
    if isinstance(FIELDS[name].default, float):
        return _real(value)
    if name in ("intermediate_size", "eos_token_id") and isinstance(value, tuple):
        return list(value)
    if name in ("layers_block_type", "mtp_layers_block_type"):
        if isinstance(value, str):
            return [blocks.from_letter(letter, name) for letter in value]
        return [blocks.canonical(v) for v in value] if isinstance(value, list | tuple) else value
    if name == "mamba_dt_limit" and isinstance(value, list | tuple):
        return tuple(_real(_infinite(v)) for v in value)
    if name in ("block_configs", "mtp_block_configs") and isinstance(value, list | tuple):
        return [_entry(v) if isinstance(v, Mapping) else v for v in value]
    if name == "mamba_ssm_cache_dtype" and not isinstance(value, str):
        return str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value
    return value


def _infinite(value: Any) -> Any:
    """JSON has no infinity: it arrives as Infinity, {"__float__": "Infinity"}, 1e308 or 1.797e308."""
    if value == {"__float__": "Infinity"}:
        return math.inf
    return math.inf if type(value) in (int, float) and value >= 1e300 else value


def _real(value: Any) -> Any:
    """An integer where the field is a real number: transformers' own class would refuse it in a saved config."""
    return float(value) if type(value) is int and abs(value) <= 2**53 else value


def _entry(given: Mapping[Any, Any]) -> dict[str, Any]:
    """One layer of `block_configs`; null means absent, except where None is a value of its own."""
    _check_keys(given)
    entry: dict[str, Any] = {"block_type": None}
    for key, value in given.items():
        name = ALIASES.get(key) or key
        if value is None and name not in ("moe_latent_size", "sliding_window"):
            continue
        if name in entry and entry[name] not in (None, value):
            raise ConfigError(f"block_configs: two spellings of {name}, {entry[name]!r} and {short(value)}, disagree")
        entry[name] = blocks.canonical(value) if name == "block_type" else value
    return entry


def _resolve(values: dict[str, Any], count: Any) -> None:
    for per_layer, name in _TYPES_OF.items():
        _resolve_types(values, name, per_layer)
    layers = values["layers_block_type"]
    if count is not None and isinstance(layers, list) and (type(count) is not int or count != len(layers)):
        raise ConfigError(f"num_hidden_layers={short(count)}: must be the number of layers ({len(layers)}), or absent")
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    hidden, expand = values["hidden_size"], values["mamba_expand"]
    _divide(values, "head_dim", "hidden_size", hidden, "num_attention_heads")
    if type(expand) is int and type(hidden) is int:
        _divide(values, "mamba_num_heads", "mamba_expand * hidden_size", expand * hidden, "mamba_head_dim")


def _resolve_types(values: dict[str, Any], name: str, per_layer: str) -> None:
    types = _types_of(values[per_layer], per_layer)
    if values[name] is None:
        values[name] = types or list(FIELDS[name].default or ("mamba", "moe", "attention", "mlp"))
    elif types is not None and values[name] != types:
        raise ConfigError(f"the block types of {per_layer} differ from {name}={short(values[name])}; give one of them")


def _types_of(entries: Any, name: str) -> list[str] | None:
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return None
    for index, entry in enumerate(entries):
        block_type = entry["block_type"]
        if not isinstance(block_type, str) or block_type not in blocks.BLOCKS:
            raise ConfigError(
                f"{name}[{index}].block_type={short(block_type)}: must be one of {', '.join(blocks.BLOCKS)}"
            )
    return [entry["block_type"] for entry in entries]


def _divide(values: dict[str, Any], name: str, top_name: str, top: Any, bottom_name: str) -> None:
    bottom = values[bottom_name]
    if values[name] is not None or type(top) is not int or type(bottom) is not int or bottom < 1:
        return
    if top % bottom:
        rule = f"{top_name} ({short(top)}) to be divisible by {bottom_name} ({short(bottom)})"
        raise ConfigError(f"{name}=None needs {rule}; give {name}")
    values[name] = top // bottom


def _check_keys(mapping: Mapping[Any, Any]) -> None:
    for key in mapping:
        if not isinstance(key, str):
            raise ConfigError(f"{short(key)}: the name of a field must be a string")


def refuse_typo(key: str) -> None:
    """Raise `ConfigError` with a suggestion when `key` is no field but looks like one."""
    if key in INERT:
        return
    close = difflib.get_close_matches(key, [*FIELDS, *ALIASES, *_PATTERNS, "num_hidden_layers"], n=1, cutoff=0.88)
    if close:
        raise ConfigError(f"unknown field {short(key)}: did you mean {close[0]!r}?")


def override(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` in its place, whichever spelling either uses."""
    _check_keys(base)
    replaced = {canonical_name(key) for key in overrides}
    replaced |= {types for name, types in _TYPES_OF.items() if overrides.get(name) is not None}
    if "layers_block_type" in replaced:
        replaced.add("num_hidden_layers")
    kept = {key: value for key, value in base.items() if canonical_name(key) not in replaced}
    return kept | dict(overrides)
