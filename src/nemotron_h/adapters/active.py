"""Several adapters side by side in one model, one of them, or none, at work at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nemotron_h.adapters.compat import require_peft
from nemotron_h.adapters.load import all_or_nothing, load_adapter
from nemotron_h.adapters.merge import merge_adapter
from nemotron_h.errors import InputError, UnsupportedError
from nemotron_h.family.fields import short


class ActiveAdapters:
    """Adapters by name on one model, which is changed in place.

    Raises as `load_adapter`, and `UnsupportedError` for an adapter that replaces biases of the base model. After an
    error the model is as before.
    """

    def __init__(self, model: Any, adapters: Mapping[str, str | os.PathLike[str]]) -> None:
        self._peft_model: Any = model
        self._lock = threading.RLock()
        require_peft()
        with all_or_nothing(model, model, ""):
            for name, path in adapters.items():
                self._add(name, path)
        self.names = tuple(adapters)
        self._now: str | None = self.names[0]
        self._switch(None)

    def _add(self, name: str, path: str | os.PathLike[str]) -> None:
        if not isinstance(name, str) or not isinstance(path, str | os.PathLike):
            raise InputError(f"adapters: must map names to paths, got {short(name)}: {short(path)}")
        self._peft_model = load_adapter(self._peft_model, path, name)
        bias = getattr(self._peft_model.peft_config[name], "bias", "none")
        if bias != "none":
            raise UnsupportedError(
                f"{path}: bias={bias!r} replaces biases of the base model, which every request shares; merge it first:"
                " LLM(load_adapter(model, path).merge_and_unload())"
            )

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Run a forward pass with this adapter, or with none; other threads wait meanwhile."""
        with self._lock:
            if name != self._now:
                self._switch(name)
            yield

    def _switch(self, name: str | None) -> None:
        tuner = self._peft_model.base_model
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self._peft_model.set_adapter(name, inference_mode=True)
        self._now = name

    def merge(self, name: str) -> Any:
        """The model with this adapter in its weights, and without any other."""
        with self._lock:
            return merge_adapter(self._peft_model, name)
