"""Sums in PyTorch: the specification. Differentiable; any device, `meta` included."""

from torch import Tensor


def add(x: Tensor, y: Tensor) -> Tensor:
    """See `nemotron_h.ops.add.add`."""
    return x + y
