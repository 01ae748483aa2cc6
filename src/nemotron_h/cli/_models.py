"""What MODEL and PRESET mean on the command line. No torch, no transformers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h import demo, family
from nemotron_h.errors import ConfigError, InputError, ModelNotFoundError, UnsupportedError
from nemotron_h.strict_json import load_json

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Shape:
    """A configuration by its origin.

    kind: "preset", "config" (a file), "checkpoint" (a directory) or "hub".
    config: Keyword arguments in any spelling, as `NemotronHConfig` and `family.describe` take them.
    directory: Of a local checkpoint.
    """

    name: str
    kind: str
    config: dict[str, Any]
    directory: Path | None = None


def weights(model: str | None) -> str:
    """Directory or hub id of a MODEL whose weights are wanted; None is the shipped model.

    Raises:
        ModelNotFoundError, InputError: nothing there, or a preset.
    """
    if model is None:
        return str(demo.demo_model())
    if _exists(model) or (_HUB_ID.fullmatch(model) and model not in family.PRESETS):
        return model
    if model in family.PRESETS:
        raise InputError(
            f"{model} is a preset: a shape without weights; `nemotron-h init {model} DIR` writes random ones"
        )
    raise ModelNotFoundError(f"{model}: no such directory, and not a hub id (owner/name){_suggestion(model)}")


def shape(model: str | None, changes: Mapping[str, Any]) -> Shape:
    """The configuration of a preset, config.json, checkpoint directory or hub id, with `changes` in any spelling.

    Raises:
        ModelNotFoundError, CheckpointError, ConfigError: nothing there, not readable, of another model.
    """
    name = str(demo.demo_model()) if model is None else model
    if name in family.PRESETS and not _exists(name):
        return Shape(name, "preset", family.preset(name, dict(changes)))
    path, kind = Path(name), "checkpoint"
    if not _exists(name):
        if not _HUB_ID.fullmatch(name):
            raise ModelNotFoundError(
                f"{name}: no preset, no file or directory, and not a hub id (owner/name){_suggestion(name)}"
            )
        file, kind = _from_hub(name), "hub"
    elif path.is_dir():
        file = path / "config.json"
    elif path.suffix == ".gguf":
        raise UnsupportedError(f"{name}: GGUF files are not read by this version")
    else:
        file, kind = path, "config"
    config = family.override(_ours(load_json(file, "config", allow_infinity=True), file), changes)
    return Shape(name, kind, config, path if kind == "checkpoint" else None)


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`--set k=v`: fields of the configuration; a value is JSON, or else a string.

    Raises:
        InputError, ConfigError: not of this form, or no such field.
    """
    return dict(_assignment(text) for text in texts)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text}: must be FIELD=VALUE, for example --set vocab_size=32000")
    if family.canonical_name(key) not in family.FIELDS and key != "num_hidden_layers":
        family.refuse_typo(key)
        raise InputError(f"--set {key}: no field of the configuration")
    if value in ("True", "False", "None"):
        return key, {"True": True, "False": False, "None": None}[value]
    try:
        return key, load_json(value.encode(errors="surrogateescape"), key, error=InputError, allow_infinity=True)
    except InputError:
        return key, value


def _ours(config: object, file: Path) -> dict[str, Any]:
    """The configuration of the language model in a config.json, which multimodal checkpoints nest one level down."""
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: a config must be a JSON object, got {type(config).__name__}")
    ours = family.language_model(config)
    family.check_model_type(ours.get("model_type"), ours)
    return ours


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError, EntryNotFoundError, HTTPError) as error:
        raise ModelNotFoundError(
            f"{name}: no such file or directory, and not on the hub: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, family.PRESETS, n=1)
    return f"; did you mean the preset {close[0]}?" if close else ""
