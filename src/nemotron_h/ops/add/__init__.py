"""Sums of equal shapes: the residual stream, and the shared expert beside the routed ones."""

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.add import native, reference

_ADD = dispatch.register("add", reference.add, native.add, native.refusal, slack=1.0)


def add(x: Tensor, y: Tensor, *, impl: str | None = None) -> Tensor:
    """`x + y`, added in float32 and rounded once: PyTorch's bits, in the dtype to which both promote.

    The kernel takes contiguous x and y of one shape, in float32 or bfloat16, x at least as wide as y. What PyTorch
    broadcasts or promotes beyond that goes to PyTorch. Raises `KernelError` when `impl="native"` cannot run.
    """
    return _ADD(x, y, impl=impl)
