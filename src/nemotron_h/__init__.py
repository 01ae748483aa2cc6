"""Nemotron-H language models: exact, hackable, fast on a CPU.

Importing this package changes nothing in torch or transformers; `register()` does, when called. Names are loaded on
first use, so that `import nemotron_h` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "CacheError": "nemotron_h.errors",
    "CheckpointError": "nemotron_h.errors",
    "ConfigError": "nemotron_h.errors",
    "InputError": "nemotron_h.errors",
    "KernelError": "nemotron_h.errors",
    "LLM": "nemotron_h.generation",
    "MissingDependencyError": "nemotron_h.errors",
    "ModelNotFoundError": "nemotron_h.errors",
    "NemotronHConfig": "nemotron_h.configuration",
    "NemotronHError": "nemotron_h.errors",
    "NemotronHForCausalLM": "nemotron_h.modeling",
    "NemotronHHybridDynamicCache": "nemotron_h.cache",
    "NemotronHModel": "nemotron_h.modeling",
    "SamplingParams": "nemotron_h.generation",
    "UnsupportedError": "nemotron_h.errors",
    "demo_model": "nemotron_h.demo",
    "load_adapter": "nemotron_h.adapters",
    "lora_targets": "nemotron_h.adapters",
    "peft_compat": "nemotron_h.adapters",
    "presets": "nemotron_h.family",
    "register": "nemotron_h.registration",
    "register_block": "nemotron_h.modeling",
}

__all__ = [
    "LLM",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "KernelError",
    "MissingDependencyError",
    "ModelNotFoundError",
    "NemotronHConfig",
    "NemotronHError",
    "NemotronHForCausalLM",
    "NemotronHHybridDynamicCache",
    "NemotronHModel",
    "SamplingParams",
    "UnsupportedError",
    "__version__",
    "demo_model",
    "load_adapter",
    "lora_targets",
    "peft_compat",
    "presets",
    "register",
    "register_block",
]

if TYPE_CHECKING:
    from nemotron_h.adapters import load_adapter, lora_targets, peft_compat
    from nemotron_h.cache import NemotronHHybridDynamicCache
    from nemotron_h.configuration import NemotronHConfig
    from nemotron_h.demo import demo_model
    from nemotron_h.errors import (
        CacheError,
        CheckpointError,
        ConfigError,
        InputError,
        KernelError,
        MissingDependencyError,
        ModelNotFoundError,
        NemotronHError,
        UnsupportedError,
    )
    from nemotron_h.family import presets
    from nemotron_h.generation import LLM, SamplingParams
    from nemotron_h.modeling import NemotronHForCausalLM, NemotronHModel, register_block
    from nemotron_h.registration import register


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
