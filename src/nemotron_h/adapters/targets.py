"""Which parts of a model take a low-rank adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nemotron_h.errors import InputError
from nemotron_h.experts import NemotronHExperts
from nemotron_h.pretrained import NemotronHPreTrainedModel

# Attributes in which PEFT keeps what it wrapped; the names of targets are those from before.
_WRAPPED = (".base_layer", ".original_module")
_OWN = ("lora_", "modules_to_save")


def lora_targets(model: nn.Module) -> dict[str, list[str]]:
    """Every projection of a model, for `peft.LoraConfig(**lora_targets(model))`.

    Returns:
        `target_modules`: full names of all linears, in the order of the model: Mamba's `in_proj` and `out_proj`,
        attention, MLP, shared experts, latent projections, `lm_head` unless it is tied to the embeddings (PEFT would
        merge an adapter on it into both), and those of the MTP head where there is one.
        `target_parameters`: full names of the stacked weights of routed experts, `....experts.up_proj` [E, F, L] and
        `....experts.down_proj` [E, L, F]. Never among them: the router, the convolution, norms, embeddings.

    Full names can be filtered: `[name for name in targets["target_modules"] if not name.startswith("mtp.")]`.

    Raises:
        InputError: not a model of this package, nor a PeftModel around one.
    """
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    base = base_of(model)
    for name, module in named_targets(base):
        if name == "lm_head" and base.config.tie_word_embeddings:
            continue
        if isinstance(module, NemotronHExperts):
            parameters |= dict.fromkeys((f"{name}.up_proj", f"{name}.down_proj"))
        elif isinstance(module, nn.Linear):
            modules[name] = None
    return {"target_modules": list(modules), "target_parameters": list(parameters)}


def base_of(model: Any) -> NemotronHPreTrainedModel:
    """The model inside a PeftModel, or the model itself. Raises `InputError` for anything else."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, NemotronHPreTrainedModel):
        raise InputError(f"model must be a NemotronHForCausalLM or a PeftModel around one, got {type(base).__name__}")
    return base


def named_targets(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model under the names they had before PEFT wrapped any; an adapter's own are left out."""
    for name, module in base.named_modules():
        if not any(part.startswith(_OWN) for part in name.split(".")):
            for wrapped in _WRAPPED:
                name = name.replace(wrapped, "")
            yield name, module
