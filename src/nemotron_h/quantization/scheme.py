"""Which weights of a model are packed, and how: the `quantization_config` that our packed checkpoints carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nemotron_h.errors import ConfigError
from nemotron_h.quantization.layout import OWN, Packing

METHOD = "nemotron_h"
ARITHMETICS = ("int8", "float32")
Arithmetic = Literal["int8", "float32"]
_FIELDS = {"quant_method", "format", "activations"}


@dataclass(frozen=True)
class Scheme:
    """Every projection, the experts and an untied `lm_head` as `format`; embeddings, router, convolution, norms and MTP
    heads stay as they are.

    format: "bf16" (exact for bfloat16 weights), "int8" or "int4".
    activations: What meets packed integers: "int8", rounded by blocks of 128, or "float32", exact and slower. With
        bf16 always "float32": activations are taken as they are.
    """

    format: str
    activations: Arithmetic = "int8"

    @property
    def packing(self) -> Packing:
        return OWN[self.format]

    def to_dict(self) -> dict[str, str]:
        return {"quant_method": METHOD, "format": self.format, "activations": self.activations}


def scheme(quantization: str | Mapping[str, Any] | Scheme) -> Scheme:
    """The scheme of a name ("bf16", "int8", "int4") or of a `quantization_config`.

    Raises:
        ConfigError: an unknown name, or a config with other fields or values.
    """
    if isinstance(quantization, Scheme):
        return quantization
    if isinstance(quantization, str):
        quantization = {"quant_method": METHOD, "format": quantization}
    if not isinstance(quantization, Mapping):
        raise ConfigError(f"quantization must be one of {', '.join(OWN)} or a mapping, got {quantization!r}")
    if set(quantization) - _FIELDS or quantization.get("quant_method") != METHOD:
        raise ConfigError(f"quantization_config must have the fields {', '.join(sorted(_FIELDS))}, got {quantization}")
    name = quantization.get("format")
    if not isinstance(name, str) or name not in OWN:
        raise ConfigError(f"quantization {name!r} is not known: use {', '.join(OWN)}")
    floating = OWN[name].floating
    activations: Any = quantization.get("activations", "float32" if floating else "int8")
    if activations not in ARITHMETICS:
        raise ConfigError(f"activations={activations!r} is not known: use {', '.join(ARITHMETICS)}")
    if floating and activations != "float32":
        raise ConfigError(f"activations={activations!r}: {name} weights take activations as they are; leave it out")
    return Scheme(name, activations)


def is_packed(quantization: Any) -> bool:
    """Whether a config's `quantization_config` says that the weights are packed in our own way."""
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD
