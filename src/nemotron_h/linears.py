"""Linear layers of the model: plain ones, and ones whose weights are packed.

Letters: N output width · K input width · n panels of 16 output rows (quantization/layout.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h.errors import InputError, UnsupportedError
from nemotron_h.ops.activations import activation as by_name
from nemotron_h.ops.linear import linear, packed_linear
from nemotron_h.ops.pack import empty_panels, pack_into
from nemotron_h.points import untouched
from nemotron_h.quantization import Packing, Scheme, unpack


class NemotronHLinear(nn.Linear):
    """An `nn.Linear` whose product is our op."""

    def forward(self, input: Tensor, activation: str = "identity", wide: bool = False) -> Tensor:
        return linear(input, self.weight, self.bias, activation, wide)

    fused = forward

    def packed(self, scheme: Scheme) -> NemotronHPackedLinear:
        """A layer with these weights packed; on `meta`, one without values."""
        layer = NemotronHPackedLinear(self.in_features, self.out_features, scheme, self.bias, self.weight.device)
        if not self.weight.is_meta:
            pack_into(layer.weight.data, self.weight, layer.packing)
        return layer


class NemotronHPackedLinear(nn.Linear):
    """A linear layer whose `weight` holds the bytes of packed panels, uint8 [n, bytes of a panel].

    It is an `nn.Linear`, so that LoRA finds it; its weights are not trained. `dequantized()` shows their values.
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, bias: Tensor | None, device: torch.device
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = empty_packed(scheme.packing.shape(out_features, in_features), device)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))

    @property
    def packing(self) -> Packing:
        return self.scheme.packing

    def forward(self, input: Tensor, activation: str = "identity", wide: bool = False) -> Tensor:
        if input.shape[-1] != self.in_features:  # the panels' bytes would also fit some other widths
            raise InputError(f"a packed layer of {self.in_features} inputs was given x {list(input.shape)}")
        return packed_linear(
            input, self.weight, self.packing, self.out_features, self.bias, self.scheme.activations, activation, wide
        )

    fused = forward

    def dequantized(self) -> Tensor:
        """float32 [N, K], exactly what the bytes mean."""
        return unpack(self.weight.data, self.packing, self.out_features, self.in_features)

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Packed parameters, with the shapes that their values have."""
        return {"weight": (self.out_features, self.in_features)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.packing.name}"

    def reset_parameters(self) -> None:
        raise UnsupportedError("packed weights are not initialized: pack a layer that is")


def activated(layer: nn.Module, x: Tensor, activation: str) -> Tensor:
    """`act(layer(x))`, in one op where nobody can tell."""
    return layer(x, activation) if _is_plain(layer) else by_name(activation)(layer(x))


def widened(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in float32, or float64: in one op where nobody can tell. PyTorch would wake its own threads for a pass
    over a large vocabulary, and they spin for milliseconds on the cores that the next token needs."""
    if _is_plain(layer):
        return layer(x, wide=True)
    y = layer(x)
    return y.to(torch.promote_types(y.dtype, torch.float32))


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is ours and nobody would miss its call."""
    return isinstance(layer, (NemotronHLinear, NemotronHPackedLinear)) and untouched(layer)


def empty_packed(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    """A parameter for packed bytes; never trained."""
    on_cpu = device.type == "cpu"
    return nn.Parameter(
        empty_panels(shape) if on_cpu else torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False
    )


def pack_modules(model: nn.Module, scheme: Scheme, keep: tuple[str, ...]) -> None:
    """Put packed layers in the place of all that can be packed, one after the other, but for those below `keep`.

    A module can be packed when it has a method `packed(scheme)` that returns its successor.
    """
    for name, module in list(model.named_modules()):
        if hasattr(module, "packed") and not f"{name}.".startswith(keep):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.packed(scheme))  # type: ignore[operator]


def packed_parameters(model: nn.Module) -> Iterator[tuple[str, Packing, tuple[int, ...]]]:
    """Packed parameters by name, with their format and the shapes of their values."""
    for prefix, module in model.named_modules():
        if hasattr(module, "packed_shapes"):
            owner: Any = module
            for leaf, shape in owner.packed_shapes().items():
                yield f"{prefix}.{leaf}" if prefix else leaf, owner.packing, shape
