"""Causal convolution by the `causal_conv1d` package on CUDA. Not run on hardware; tests check the call with a stand-in.

Letters: B batch · T tokens · C channels · K taps.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor


def refusal(x_BTC: Tensor, activation: str, window_BCK: Tensor | None, lengths_B: Tensor | None) -> str | None:
    """Why the package cannot take this call; None when it can."""
    if not x_BTC.is_cuda:
        return f"the tensors are on {x_BTC.device}, not on CUDA"
    if find_spec("causal_conv1d") is None:
        return "causal_conv1d is not installed"
    if activation not in ("silu", "swish"):
        return f"the package has silu only, not {activation}"
    if lengths_B is not None:
        return "the package knows no padding"
    return None


def causal_conv1d(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    activation: str,
    window_BCK: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `nemotron_h.ops.causal_conv1d.causal_conv1d`; valid only where `refusal` is None."""
    package = import_module("causal_conv1d")
    x_BCT = x_BTC.transpose(1, 2)
    if x_BTC.shape[1] == 1 and window_BCK is not None:
        window_BCK = window_BCK.clone(memory_format=torch.contiguous_format)
        y_BC = package.causal_conv1d_update(x_BCT[..., 0], window_BCK, weight_CK, bias_C, activation)
        return y_BC[:, None], window_BCK
    y_BCT, final_BCK = package.causal_conv1d_fn(
        x_BCT,
        weight_CK,
        bias_C,
        seq_idx=seq_idx_BT,
        initial_states=window_BCK,
        return_final_states=True,
        activation=activation,
    )
    return y_BCT.transpose(1, 2), final_BCK
