"""`register()`: make transformers' Auto classes build this package's classes for `nemotron_h`."""

from __future__ import annotations


def register() -> None:
    """Point `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` at our classes for model type "nemotron_h".

    Explicit, never done on import; `from transformers import NemotronHForCausalLM` stays transformers' own. Calling it
    again changes nothing.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from nemotron_h.configuration import NemotronHConfig
    from nemotron_h.modeling import NemotronHForCausalLM, NemotronHModel

    AutoConfig.register("nemotron_h", NemotronHConfig, exist_ok=True)
    AutoModel.register(NemotronHConfig, NemotronHModel, exist_ok=True)
    AutoModelForCausalLM.register(NemotronHConfig, NemotronHForCausalLM, exist_ok=True)
