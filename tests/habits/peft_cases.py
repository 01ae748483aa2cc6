"""Models with adapters that have an effect, and what such a model must compute, by weights written out in full."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from helpers import draw_ids, tiny_model
from nemotron_h import NemotronHForCausalLM, lora_targets, peft_compat
from nemotron_h.adapters import allow_expert_dora

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


def build(**overrides: Any) -> NemotronHForCausalLM:
    return tiny_model(**(MTP | overrides))


def draw_adapter(peft_model: Any, seed: int = 0, name: str = "default") -> None:
    """Fill the adapter so that logits move by about 1: nothing in it is zero or neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in peft_model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if f".lora_A.{name}." in key:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            elif f".lora_B.{name}." in key:
                tensor.copy_(0.1 * noise)
            elif f".lora_magnitude_vector.{name}." in key:
                tensor.mul_(1 + 0.1 * noise)


def adapted(model: NemotronHForCausalLM, seed: int = 0, targets: dict[str, Any] | None = None, **config: Any) -> Any:
    """A PeftModel in eval mode with a drawn adapter on all targets, or on those given."""
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | (targets or lora_targets(model)) | config
    with peft_compat(model):
        peft_model = get_peft_model(model, allow_expert_dora(LoraConfig(**settings)))
    draw_adapter(peft_model, seed)
    return peft_model.eval()


def without(targets: dict[str, list[str]], *leaves: str) -> dict[str, list[str]]:
    """Targets but those with these last names."""
    return {key: [name for name in names if name.split(".")[-1] not in leaves] for key, names in targets.items()}


def written_out(peft_model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    """The state dict of a plain model whose weights are `W + s·B·A`, or DoRA's `m · (W + s·B·A) / |W + s·B·A|`.

    From the parameters alone: each factor is found by its name, each expert multiplied by itself.
    """
    state = {key: tensor.detach().clone() for key, tensor in peft_model.get_base_model().state_dict().items()}
    plain = {re.sub(r"\.base_layer", "", key): value for key, value in state.items() if ".lora_" not in key}
    for key, a in state.items():
        found = re.fullmatch(rf"(.*?)((?:\.base_layer)*)\.lora_A\.{name}\.weight", key)
        if found is None:
            continue
        module, depth = found[1], found[2].count("base_layer")
        stem = key.removesuffix(f".lora_A.{name}.weight")
        layer: Any = peft_model.get_base_model().get_submodule(stem)
        b, m = state[f"{stem}.lora_B.{name}.weight"], state.get(f"{stem}.lora_magnitude_vector.{name}.weight")
        if module.endswith(".experts"):
            target = f"{module}.{('down_proj', 'up_proj')[depth]}"
            experts = plain[target].shape[0]
            rank = a.shape[0] // experts
            delta = torch.stack([b[:, e::experts] @ a[e * rank : (e + 1) * rank] for e in range(experts)])
        else:
            target, delta = f"{module}.weight", b @ a
        weight = plain[target].to(delta.dtype) + layer.scaling[name] * delta
        if m is not None:
            weight = weight * (m / weight.norm(dim=-1))[..., None]
        plain[target] = weight.to(plain[target].dtype)
    return plain


def plain_model(peft_model: PeftModel, name: str = "default", **overrides: Any) -> NemotronHForCausalLM:
    """A fresh model with the written out weights."""
    base = peft_model.get_base_model()
    model = NemotronHForCausalLM(type(base.config).from_dict(base.config.to_dict())).to(base.dtype)
    model.load_state_dict(written_out(peft_model, name))
    return model.eval()


@torch.no_grad()
def logits(model: Any, seed: int = 0) -> Tensor:
    """[2, 20, V]: enough visits for the grouped product of experts."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model(draw_ids(base, 2, 20, seed=seed)).logits


def saved(peft_model: Any, directory: Path) -> Path:
    peft_model.save_pretrained(directory)
    return directory
