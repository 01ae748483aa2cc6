"""LoRA and its relatives through PEFT, which is an optional dependency: nothing here imports it before it is needed.

`lora_targets` lists what can be adapted, `peft_compat` lets PEFT adapt it, `load_adapter` reads an adapter strictly,
`export_adapter` writes one in PEFT's keys or in keys per expert, `merge_adapter` puts one into the weights,
`allow_expert_dora` extends DoRA to routed experts.
"""

from nemotron_h.adapters.compat import allow_expert_dora, peft_compat
from nemotron_h.adapters.export import export_adapter
from nemotron_h.adapters.load import load_adapter
from nemotron_h.adapters.merge import merge_adapter
from nemotron_h.adapters.targets import lora_targets

__all__ = ["allow_expert_dora", "export_adapter", "load_adapter", "lora_targets", "merge_adapter", "peft_compat"]
