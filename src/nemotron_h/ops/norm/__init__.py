"""RMSNorm, plain and gated (numerics.md, "Model" and "Mamba-2 mixer" step 5).

Letters: D channels · I Mamba channels (heads × head size) · G groups · ... any leading dimensions.
"""

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.norm import native, reference

# Slack: half an eps for each rounding between a row's sum of squares and its elements, which all share one scale, so a
# short row has no average to hide it. Plain: root, division, two products. Gated: sigmoid and gate besides.
_RMS_NORM = dispatch.register("rms_norm", reference.rms_norm, native.rms_norm, native.refusal, slack=2.0)
_GATED_RMS_NORM = dispatch.register(
    "gated_rms_norm", reference.gated_rms_norm, native.gated_rms_norm, native.gated_refusal, slack=3.0
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """`(w.float() · x.float() · rsqrt(mean(x²) + eps)).to(dtype of x)`, the mean over the last dimension.

    x [..., D] and weight [D], any floating dtypes, on one device; computed in float32, in float64 when x is. Returns
    [..., D] in x's dtype. The kernel takes float32 and bfloat16 in any mix; its bits do not depend on its level or on
    the number of rows. Raises `InputError` when the shapes do not fit, `KernelError` when `impl="native"` cannot run.
    """
    return _RMS_NORM(x, weight, eps, impl=impl)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int, *, impl: str | None = None
) -> Tensor:
    """Gate, then RMS over each of G = n_groups groups: `u = y·silu(z)`, `weight · (u · rsqrt(mean_group(u²) + eps))`.

    y, z [..., I] and weight [I]; computed in float32, in float64 when y or z is. Returns [..., I] in z's dtype, which
    is the model's: y may come from the SSD in float32. The kernel takes float32 and bfloat16 in any mix; its bits do
    not depend on its level, on the number of rows or on the threads. Raises `InputError` when the shapes do not fit,
    `KernelError` when `impl="native"` cannot run.
    """
    return _GATED_RMS_NORM(y, z, weight, eps, n_groups, impl=impl)
