"""What PEFT needs to be told about this model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from nemotron_h.adapters.targets import base_of
from nemotron_h.errors import MissingDependencyError

if TYPE_CHECKING:
    from peft import LoraConfig

Model = TypeVar("Model", bound=nn.Module)

# Any name that PEFT has no rules for.
_SHADOW = "nemotron_h_adapted"
_lock = threading.Lock()
_open: dict[int, int] = {}  # contexts that are open, by id of the config


@contextmanager
def peft_compat(model: Model) -> Iterator[Model]:
    """Let PEFT adapt `out_proj`: `with peft_compat(model): get_peft_model(model, config)`.

    PEFT 0.21 refuses `out_proj` for model_type "nemotron_h", since the fused kernels of other implementations read its
    weight past the adapter. Here the mixer calls the module. Inside the context `model.config.model_type` of this one
    instance says something else; the class, a config.json that is saved meanwhile, and PEFT itself do not change.
    Contexts may be nested and may overlap in threads; the last one out restores the name, also after an error.

    Args:
        model: `NemotronHForCausalLM`, `NemotronHModel`, or a PeftModel around one. Returned by the `with`.

    Raises:
        InputError: not a model of this package.
    """
    config: Any = base_of(model).config
    with _lock:
        _open[id(config)] = _open.get(id(config), 0) + 1
        config.model_type = _SHADOW
    try:
        yield model
    finally:
        with _lock:
            _open[id(config)] -= 1
            if not _open[id(config)]:
                del _open[id(config)]
                del config.model_type  # of the instance; the class has its own


def allow_expert_dora(config: LoraConfig) -> LoraConfig:
    """Make `use_dora=True` work for routed experts, where PEFT refuses it; returns the same config.

    with peft_compat(model):
        peft_model = get_peft_model(model, allow_expert_dora(LoraConfig(use_dora=True, **lora_targets(model))))

    It is saved as usual and read back by `load_adapter`; plain PEFT cannot load DoRA of stacked experts. Without
    `use_dora` nothing changes. Raises `MissingDependencyError` without PEFT.
    """
    require_peft()
    from nemotron_h.adapters.dora import ParamWrapper
    from nemotron_h.experts import NemotronHExperts

    config._register_custom_module({NemotronHExperts: ParamWrapper})
    return config


def require_peft() -> None:
    """Raise `MissingDependencyError` unless PEFT can be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("adapters need PEFT: pip install 'nemotron-h[peft]'") from error
