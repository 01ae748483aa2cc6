"""`merge_adapter`: an adapter into the weights, also where two modules share one."""

from __future__ import annotations

from typing import Any

from nemotron_h.adapters.compat import require_peft
from nemotron_h.adapters.targets import base_of
from nemotron_h.errors import InputError
from nemotron_h.modeling import NemotronHForCausalLM


def merge_adapter(peft_model: Any, adapter_name: str | None = None) -> NemotronHForCausalLM:
    """The model inside with an adapter in its weights and without any other, as PEFT's `merge_and_unload`.

    With tied embeddings and an adapter on `lm_head`, PEFT would change the embeddings as well, which is another model:
    here `lm_head` gets a weight of its own first, and the config says so.

    Args:
        adapter_name: Which; default the active one.

    Raises:
        InputError: no PeftModel, or no such adapter. MissingDependencyError: without PEFT.
    """
    require_peft()
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(peft_model, PeftModel):
        raise InputError(f"merge_adapter needs a PeftModel, got {type(peft_model).__name__}")
    name: Any = peft_model.active_adapter if adapter_name is None else adapter_name
    if name not in peft_model.peft_config:
        raise InputError(f"adapter_name={name!r}: the model has {', '.join(peft_model.peft_config)}")
    base: Any = base_of(peft_model)
    peft_model.set_adapter(name, inference_mode=True)
    layer: Any = getattr(base, "lm_head", None)
    if base.config.tie_word_embeddings and isinstance(layer, BaseTunerLayer) and _adapts(layer, name):
        head: Any = layer.get_base_layer()
        head.weight = type(head.weight)(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
    return peft_model.merge_and_unload(adapter_names=[name])


def _adapts(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, kind) for kind in layer.adapter_layer_names)
