"""`export_adapter`: an adapter's files, in PEFT's keys or with one tensor per expert."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron_h.adapters import names
from nemotron_h.adapters.compat import require_peft
from nemotron_h.adapters.load import CONFIG, WEIGHTS
from nemotron_h.adapters.names import PREFIX
from nemotron_h.checkpoint.safetensors import aligned, spec_of, write_temporary_file
from nemotron_h.errors import InputError, UnsupportedError
from nemotron_h.files import publish, sync_directory, write_temporary

LAYOUTS = ("peft", "per_expert")


def export_adapter(
    peft_model: Any, directory: str | os.PathLike[str], layout: str = "peft", adapter_name: str | None = None
) -> None:
    """Write adapter_model.safetensors and adapter_config.json; each file appears complete or not at all.

    Args:
        peft_model: PeftModel around a model of this package.
        layout: "peft" has the names and shapes that PEFT's `save_pretrained` writes: routed experts stacked.
            "per_expert" has the names of the hub, of NVIDIA's remote code and of vLLM: each expert's lora_A [r, in] and
            lora_B [out, r] by itself, `base_model.model.backbone.layers.1.mixer.experts.7.up_proj.lora_A.weight`.
            `load_adapter` reads both.
        adapter_name: Which; default the active one.

    Raises:
        InputError: no PeftModel, no such adapter, no such layout.
        UnsupportedError: layout "per_expert" of another type than LoRA.
    """
    require_peft()
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(peft_model, PeftModel):
        raise InputError(f"export_adapter needs a PeftModel, got {type(peft_model).__name__}")
    if layout not in LAYOUTS:
        raise InputError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}")
    name = peft_model.active_adapter if adapter_name is None else adapter_name
    if name not in peft_model.peft_config:
        raise InputError(f"adapter_name={name!r}: the model has {', '.join(peft_model.peft_config)}")
    config = peft_model.peft_config[name]
    if layout == "per_expert" and config.peft_type != "LORA":
        raise UnsupportedError(f"layout='per_expert' is for LoRA, {name!r} is {config.peft_type}: take layout='peft'")

    state = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    settings = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    settings["inference_mode"] = True
    if layout == "per_expert":
        state = _per_expert(peft_model.get_base_model(), state)
        settings |= _settings_per_expert(peft_model.get_base_model(), name, state, settings)
    _write(Path(directory), state, settings)


def _per_expert(base: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    counts = names.expert_counts(base)
    places = {place: target for target, place in names.wrappers(base).items()}
    found = {}
    for name, tensor in state.items():
        own = name.removeprefix(PREFIX)
        key = names.parse(own)
        target = None if key is None else places.get(key.module + key.wrappers)
        if key is None or target is None:
            found[PREFIX + names.hub(own)] = tensor
            continue
        module, _, projection = names.hub(target).rpartition(".")
        for expert, part in enumerate(names.unstack(key.kind, tensor, counts[target])):
            found[f"{PREFIX}{module}.{expert}.{projection}.{key.kind}"] = part
    return found


def _settings_per_expert(
    base: Any, adapter_name: str, state: dict[str, Tensor], settings: dict[str, Any]
) -> dict[str, Any]:
    """Exact names of all targets, and the rank and alpha of each where they differ from the usual ones."""
    from peft.tuners.lora import LoraLayer

    places = {place: target for target, place in names.wrappers(base).items()}
    ranks, alphas = {}, {}
    for place, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            target = names.hub(places.get(place) or place)
            ranks[target], alphas[target] = layer.r[adapter_name], layer.lora_alpha[adapter_name]
    keys = [key for key in (names.parse(name.removeprefix(PREFIX)) for name in state) if key is not None]
    spelled = {_spelled(key): key.target for key in keys}
    return {
        "target_modules": list(spelled),
        "target_parameters": None,
        "modules_to_save": settings["modules_to_save"] and [names.hub(name) for name in settings["modules_to_save"]],
        "rank_pattern": {n: ranks[t] for n, t in spelled.items() if ranks[t] != settings["r"]},
        "alpha_pattern": {n: alphas[t] for n, t in spelled.items() if alphas[t] != settings["lora_alpha"]},
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }


def _spelled(key: names.Key) -> str:
    return key.module if key.expert is None else f"{key.module}.{key.expert}.{key.projection}"


def _write(directory: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Both files are complete and on the disk before the first gets its name."""
    directory.mkdir(parents=True, exist_ok=True)
    specs = aligned([spec_of(name, tensor) for name, tensor in state.items()])
    text = json.dumps(settings, indent=2, sort_keys=True).encode()
    with ExitStack() as undo:
        tensors = ((spec.name, state[spec.name].detach()) for spec in specs)
        weights = write_temporary_file(directory / WEIGHTS, specs, tensors, {"format": "pt"})
        undo.callback(weights.unlink, missing_ok=True)
        config = write_temporary(directory / CONFIG, [memoryview(text)])
        undo.callback(config.unlink, missing_ok=True)
        publish(weights, directory / WEIGHTS)
        publish(config, directory / CONFIG)
    sync_directory(directory)
