"""Depthwise causal convolution over time (numerics.md, "Mamba-2 mixer" step 2).

Letters: B batch · T tokens · C channels · K taps.
"""

from typing import NamedTuple

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.causal_conv1d import cuda, native, reference
from nemotron_h.ops.causal_conv1d.reference import next_window

__all__ = ["ConvResult", "causal_conv1d", "next_window"]


class ConvResult(NamedTuple):
    """`output` [B, T, C] in x's dtype; `window` [B, C, K-1], the inputs that the next token needs, in x's dtype."""

    output: Tensor
    window: Tensor


_CONV = dispatch.register("causal_conv1d", reference.causal_conv1d, native.causal_conv1d, native.refusal)


def causal_conv1d(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    activation: str,
    window_BCK: Tensor | None = None,
    lengths_B: Tensor | None = None,
    seq_idx_BT: Tensor | None = None,
    *,
    use_packages: bool = False,
    impl: str | None = None,
) -> ConvResult:
    """`activation(bias + sum_k weight[:, k] · x[t - (K-1) + k])`, computed in float32 (float64 in a float64 model).

    Args:
        x_BTC: Inputs; tokens in front of the first are `window_BCK`, or zero.
        weight_CK: Taps, the last one for the current token.
        activation: Name as in `ops.activations`.
        window_BCK: The K-1 inputs before x, oldest first.
        lengths_B: Real tokens per row, which come first; the returned window ends there. None: all T.
        seq_idx_BT: Document of each token; taps do not reach into another document.
        use_packages: On CUDA, take the `causal_conv1d` package where it is installed and can do the call.
    """
    packages = use_packages and impl is None
    if packages and cuda.refusal(x_BTC, weight_CK, activation, window_BCK, lengths_B, seq_idx_BT) is None:
        return ConvResult(*cuda.causal_conv1d(x_BTC, weight_CK, bias_C, activation, window_BCK, seq_idx_BT))
    return ConvResult(*_CONV(x_BTC, weight_CK, bias_C, activation, window_BCK, lengths_B, seq_idx_BT, impl=impl))
