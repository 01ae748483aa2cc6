"""adapter_config.json from strangers: read strictly, and reduced to what says which numbers go where.

PEFT itself follows some keys into code: `megatron_core` is imported, prompt tuning loads a tokenizer, other
initializations rewrite the base model. None of them is passed on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_h.errors import CheckpointError, UnsupportedError
from nemotron_h.strict_json import load_json, shown

# Types whose tensors belong to single modules and whose settings are plain numbers and names.
TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT")

# Keys of every type that say nothing about the numbers.
_IGNORED = {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "peft_type"}
_LORA = {
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern",
    "target_modules", "target_parameters", "modules_to_save", "task_type", "init_lora_weights", "exclude_modules",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "trainable_token_indices",
}  # fmt: skip
# Initializations that leave the base model alone; once the tensors are loaded nothing is left of them.
_HARMLESS = (True, False, "gaussian", "orthogonal", "eva", None)
_NEUTRAL = (None, False, [], {}, "")
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
_LONGEST_PATTERN, _MOST_REPEATS = 300, 3


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of an adapter_config.json that PEFT's config class may get, `peft_type` among them.

    Raises:
        CheckpointError: no JSON object, or values of a wrong kind. UnsupportedError: a type of adapter, or a setting,
            that is not read here; both say so of `path`.
    """
    loaded = load_json(path, "adapter config")
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: must hold an object, holds a {type(loaded).__name__}")
    kind = loaded.get("peft_type")
    if kind not in TYPES:
        raise UnsupportedError(
            f"{path}: peft_type={shown(kind)}: {', '.join(TYPES)} are read; for others call"
            " peft.PeftModel.from_pretrained inside `with nemotron_h.peft_compat(model)`, if you trust the files"
        )
    settings = {key: value for key, value in loaded.items() if key not in _IGNORED}
    if settings.get("task_type") not in _TASKS:
        raise UnsupportedError(f"{path}: task_type={shown(settings['task_type'])}: must be CAUSAL_LM or null")
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        _check_names(path, name, settings.get(name), matched=kind != "LORA")
    settings = _check_lora(path, settings) if kind == "LORA" else _check_known(path, kind, settings)
    return settings | {"peft_type": kind}


def _check_known(path: Path, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    defaults = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    for key, value in settings.items():
        if key not in defaults and value not in _NEUTRAL:
            raise UnsupportedError(f"{path}: {key}={shown(value)}: the installed PEFT knows no such setting of {kind}")
    return {key: value for key, value in settings.items() if key in defaults}


def _check_lora(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for key, value in settings.items():
        if key not in _LORA and value not in _NEUTRAL and value != defaults.get(key):
            raise UnsupportedError(f"{path}: {key}={shown(value)} is not read; only plain LoRA, rsLoRA and DoRA are")
    init = settings.get("init_lora_weights")
    if init not in _HARMLESS:
        raise UnsupportedError(
            f"{path}: init_lora_weights={shown(init)} rewrites the base model; save the adapter as plain LoRA:"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for key in ("r", "lora_alpha"):
        _check_number(path, key, settings.get(key, 8))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{path}: {key} must be an object, is {shown(patterns)}")
        for pattern, value in patterns.items():
            _check_pattern(path, key, pattern)
            _check_number(path, f"{key}[{pattern!r}]", value)
    for key in ("use_dora", "use_rslora", "lora_bias"):
        if not isinstance(settings.get(key, False), bool):
            raise CheckpointError(f"{path}: {key} must be true or false, is {shown(settings[key])}")
    return {key: value for key, value in settings.items() if key in _LORA} | {"init_lora_weights": True}


def _check_number(path: Path, key: str, value: Any) -> None:
    whole = key.startswith("r")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or whole and value < 1:
        kind = "an integer >= 1" if whole else "a number"
        raise CheckpointError(f"{path}: {key} must be {kind}, is {shown(value)}")


def _check_names(path: Path, key: str, value: Any, matched: bool) -> None:
    """`matched`: PEFT will use it; the targets of a LoRA are seen in its tensors."""
    if isinstance(value, str) and key in ("target_modules", "exclude_modules"):
        if matched:
            _check_pattern(path, key, value)
    elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise CheckpointError(f"{path}: {key} must be a list of names, is {shown(value)}")


def _check_pattern(path: Path, key: str, pattern: str) -> None:
    """PEFT matches this regular expression with every module's name; some would take it hours."""
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+?{]", pattern):
        raise UnsupportedError(f"{path}: {key}: the pattern {shown(pattern)} is too involved; list the names instead")
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{path}: {key}: {shown(pattern)} is no regular expression: {error}") from error


def pattern_value(patterns: Mapping[str, Any], spellings: Sequence[str], default: Any) -> Any:
    """The value of the first of PEFT's patterns that matches a target, under any of its names."""
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in spellings):
            return value
    return default
