"""Linear layers over plain and packed weights.

Letters: ... any leading dimensions · M rows in all · N output width · K input width.
"""

from __future__ import annotations

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.linear import native, reference
from nemotron_h.quantization import Arithmetic, Packing

_LINEAR = dispatch.register("linear", reference.linear, native.linear, native.refusal, slack=16.0)
_PACKED = dispatch.register(
    "packed_linear", reference.packed_linear, native.packed_linear, native.packed_refusal, slack=16.0
)


def linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    activation: str = "identity",
    wide: bool = False,
    *,
    impl: str | None = None,
) -> Tensor:
    """`act(x Wᵀ + bias)`, x [..., K] to [..., N] in x's dtype; the sum in float32 (float64 in a float64 model).

    The activation takes the product as it would be returned, rounded to x's dtype, so that fusing it changes no bit;
    the kernel knows "identity" and "relu2". `wide` returns the same values in float32, as `.to(torch.float32)` would:
    logits of a large vocabulary then need no pass of their own.

    The kernel takes up to 8 rows in bfloat16 or float32, and weights of the same dtype whose rows are contiguous. Its
    order of additions is that of the matrix units: for each 32 columns an even and an odd chain from zero, their sum
    added to the total. A row's bits depend on that row alone. Raises `KernelError` when `impl="native"` cannot run.
    """
    return _LINEAR(x, weight_NK, bias_N, activation, wide, impl=impl)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    packing: Packing,
    out_features: int,
    bias_N: Tensor | None = None,
    arithmetic: Arithmetic = "int8",
    activation: str = "identity",
    wide: bool = False,
    *,
    impl: str | None = None,
) -> Tensor:
    """`act(x Wᵀ + bias)` with W [N, K] packed in uint8 [panels, bytes]; x [..., K] to [..., N] in x's dtype.

    Args:
        arithmetic: Of packed integers: "int8" rounds every 128 activations of a row to int8 with one scale, then adds
            exactly within them; "float32" keeps the activations, several times slower. bf16 weights always take x as it
            is, bfloat16 or float32, and add in the order of `linear`: for bfloat16 x its kernel's bits. Gradients flow
            to x in all, as through the weights that the bytes mean.
        activation, wide: As in `linear`.

    Any number of rows; a row's bits depend on that row alone. Raises `KernelError` when `impl="native"` cannot run.
    """
    return _PACKED(x, packed, packing, out_features, bias_N, arithmetic, activation, wide, impl=impl)
