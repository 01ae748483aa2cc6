"""`register()`: make transformers' Auto classes build this package's classes for `nemotron_h`."""

from __future__ import annotations


def register() -> None:
    """Point `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` at our classes for model type "nemotron_h".

    Explicit, never done on import; `from transformers import NemotronHForCausalLM` stays transformers' own. Calling it
    again changes nothing.

    transformers also renames `backbone.` of checkpoints to its own `model.`, but for classes of its own only. With the
    same list registered for ours, PEFT adapters with `backbone.` in their keys find their modules; `from_pretrained`
    and `save_pretrained` of our classes read and write hub names themselves and do not use it.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    from nemotron_h.configuration import NemotronHConfig
    from nemotron_h.modeling import NemotronHForCausalLM, NemotronHModel

    AutoConfig.register("nemotron_h", NemotronHConfig, exist_ok=True)
    AutoModel.register(NemotronHConfig, NemotronHModel, exist_ok=True)
    AutoModelForCausalLM.register(NemotronHConfig, NemotronHForCausalLM, exist_ok=True)
    renaming = get_checkpoint_conversion_mapping("nemotron_h")
    assert renaming is not None, "transformers has NemotronH and renames its checkpoints"
    register_checkpoint_conversion_mapping("nemotron_h", renaming, overwrite=True)
