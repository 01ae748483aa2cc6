"""Causal convolution by the C++ kernel (csrc/kernels/causal_conv1d.cpp): float32 and bfloat16 on the CPU, without grad.

Letters: B batch · T tokens · C channels · K taps.
"""

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain

FEW = 8  # tokens up to which a level that emulates serves decoding all the same
TAPS = (2, 3, 4, 5)  # csrc/kernels/causal_conv1d.cpp: with_taps


def refusal(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    activation: str,
    window_BCK: Tensor | None,
    lengths_B: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    if activation not in ("silu", "swish"):
        return f"the kernel has silu only, not {activation}"
    tensors = [t for t in (x_BTC, weight_CK, bias_C, window_BCK) if t is not None]
    reason = not_plain(*tensors)
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor.dtype not in DTYPE_CODES:
            return f"the kernel takes float32 and bfloat16, not {tensor.dtype}"
    if window_BCK is not None and window_BCK.dtype != x_BTC.dtype:
        return f"the window is {window_BCK.dtype}, x is {x_BTC.dtype}"
    reason = _wrong_shapes(x_BTC, weight_CK, bias_C, window_BCK) or _wrong_rows(x_BTC, lengths_B, seq_idx_BT)
    if reason is None and x_BTC.shape[1] > FEW and _native.emulates():
        return _native.EMULATED
    return reason


def _wrong_rows(x_BTC: Tensor, lengths_B: Tensor | None, seq_idx_BT: Tensor | None) -> str | None:
    for name, tensor, dims in (("lengths", lengths_B, 1), ("seq_idx", seq_idx_BT, 2)):
        if tensor is None:
            continue
        reason = not_plain(tensor)
        if reason is not None:
            return reason
        if tensor.shape != x_BTC.shape[:dims] or tensor.dtype not in (torch.int64, torch.int32):
            return f"{name} {tensor.dtype} {list(tensor.shape)} must be int64 {list(x_BTC.shape[:dims])}"
    if lengths_B is not None and not 0 <= int(lengths_B.min()) <= int(lengths_B.max()) <= x_BTC.shape[1]:
        return f"lengths must lie between 0 and the {x_BTC.shape[1]} tokens of x"
    return None


def _wrong_shapes(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, window_BCK: Tensor | None) -> str | None:
    if x_BTC.dim() != 3 or weight_CK.dim() != 2 or x_BTC.shape[2] != weight_CK.shape[0]:
        return f"weight {list(weight_CK.shape)} does not fit x {list(x_BTC.shape)}"
    batch, _, channels = x_BTC.shape
    taps = weight_CK.shape[1]
    if x_BTC.numel() == 0:
        return "x is empty"
    if taps not in TAPS:
        return f"the kernel takes {TAPS[0]} to {TAPS[-1]} taps, not {taps}"
    if bias_C is not None and bias_C.shape != (channels,):
        return f"bias {list(bias_C.shape)} does not fit x {list(x_BTC.shape)}"
    if window_BCK is not None and window_BCK.shape != (batch, channels, taps - 1):
        return f"window {list(window_BCK.shape)} must be {[batch, channels, taps - 1]}"
    if x_BTC.stride(2) != 1 and channels != 1:
        return f"the rows of x (strides {x_BTC.stride()}) are not contiguous"
    if weight_CK.stride() != (taps, 1):
        return f"weight (strides {weight_CK.stride()}) is not contiguous"
    if bias_C is not None and not bias_C.is_contiguous():
        return "bias is not contiguous"
    return None


def causal_conv1d(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    activation: str,
    window_BCK: Tensor | None,
    lengths_B: Tensor | None,
    seq_idx_BT: Tensor | None,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `nemotron_h.ops.causal_conv1d.causal_conv1d`; valid only where `refusal` is None.

    The new window is a view of a [B, K-1, C] tensor: the next step reads it by whole rows.
    """
    batch, tokens, channels = x_BTC.shape
    taps = weight_CK.shape[1]
    out_BTC, window_BKC = x_BTC.new_empty(batch, tokens, channels), x_BTC.new_empty(batch, taps - 1, channels)
    bias, bias_dtype = (0, x_BTC.dtype) if bias_C is None else (bias_C.data_ptr(), bias_C.dtype)
    window, strides = (0, (0, 0, 0)) if window_BCK is None else (window_BCK.data_ptr(), window_BCK.stride())
    lengths = None if lengths_B is None else lengths_B.long().contiguous()
    documents = None if seq_idx_BT is None else seq_idx_BT.long().contiguous()
    threads.sync()
    _native.kernels(level).causal_conv1d(
        x_BTC.data_ptr(), weight_CK.data_ptr(), bias, window,
        0 if lengths is None else lengths.data_ptr(), 0 if documents is None else documents.data_ptr(),
        out_BTC.data_ptr(), window_BKC.data_ptr(), batch, tokens, channels, taps, *x_BTC.stride()[:2], *strides,
        DTYPE_CODES[x_BTC.dtype], DTYPE_CODES[weight_CK.dtype], DTYPE_CODES[bias_dtype],
    )  # fmt: skip
    return out_BTC, window_BKC.transpose(1, 2)
