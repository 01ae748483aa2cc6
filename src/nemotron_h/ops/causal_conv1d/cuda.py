"""Causal convolution by the `causal_conv1d` package on CUDA. Not run on hardware; tests check the call with a stand-in.

Letters: B batch · T tokens · C channels · K taps.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNED = 8  # channels, and elements from row to row


def refusal(
    x_BTC: Tensor,
    weight_CK: Tensor,
    activation: str,
    window_BCK: Tensor | None,
    lengths_B: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> str | None:
    """Why the package cannot take this call; None when it can."""
    if not x_BTC.is_cuda:
        return f"the tensors are on {x_BTC.device}, not on CUDA"
    if find_spec("causal_conv1d") is None:
        return "causal_conv1d is not installed"
    if activation not in ("silu", "swish"):
        return f"the package has silu only, not {activation}"
    if x_BTC.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the package has no kernel for {x_BTC.dtype}"
    if x_BTC.shape[2] % _ALIGNED or not 2 <= weight_CK.shape[1] <= 4:
        return "the package takes 2 to 4 taps, and channels in multiples of 8"
    if lengths_B is not None:
        return "the package knows no padding"
    if seq_idx_BT is not None and window_BCK is not None:
        return "the package takes packed documents or a window, not both"
    if _one_token(x_BTC, window_BCK) and torch.is_grad_enabled() and (x_BTC.requires_grad or weight_CK.requires_grad):
        return "the package's one-token kernel has no backward"
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
    if window_BCK is not None and _one_token(x_BTC, window_BCK):
        window_BCK = window_BCK.to(x_BTC.dtype, copy=True)  # the kernel writes into it
        y_BC = package.causal_conv1d_update(x_BTC[:, 0], window_BCK, weight_CK, bias_C, activation)
        return y_BC[:, None], window_BCK
    x_BCT = _aligned(x_BTC).transpose(1, 2)
    if seq_idx_BT is not None:  # then the package returns no window
        seq_idx = seq_idx_BT.int().contiguous()
        y_BCT = package.causal_conv1d_fn(x_BCT, weight_CK, bias_C, seq_idx=seq_idx, activation=activation)
        width = weight_CK.shape[1] - 1
        return y_BCT.transpose(1, 2), F.pad(x_BTC, (0, 0, width, 0))[:, -width:].transpose(1, 2)
    if window_BCK is not None:  # channels must lie next to each other here too
        window_BCK = window_BCK.to(x_BTC.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    y_BCT, final_BCK = package.causal_conv1d_fn(
        x_BCT, weight_CK, bias_C, initial_states=window_BCK, return_final_states=True, activation=activation
    )
    return y_BCT.transpose(1, 2), final_BCK


def _one_token(x_BTC: Tensor, window_BCK: Tensor | None) -> bool:
    return x_BTC.shape[1] == 1 and window_BCK is not None


def _aligned(x_BTC: Tensor) -> Tensor:
    """Rows as the kernel reads them: channels next to each other, rows at multiples of 8."""
    batch, row, channel = x_BTC.stride()
    return x_BTC if channel == 1 and row % _ALIGNED == batch % _ALIGNED == 0 else x_BTC.contiguous()
