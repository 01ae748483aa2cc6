"""Activation functions by the names that configs use; `relu2` is the family's own, relu(x)²."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.errors import UnsupportedError


def relu2(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


_gelu_tanh = partial(F.gelu, approximate="tanh")
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": relu2,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": torch.clone,
    "identity": torch.clone,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a config calls `name`, elementwise."""
    if name not in _FUNCTIONS:
        raise UnsupportedError(f"activation {name!r}: known are {', '.join(_FUNCTIONS)}")
    return _FUNCTIONS[name]
