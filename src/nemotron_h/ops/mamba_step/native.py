"""A Mamba step by the C++ kernel (csrc/kernels/mamba_step.cpp), on the CPU, without grad.

Letters: B batch · T tokens · H heads · P head size · I = H·P · G groups · N state size · C = I + 2·G·N · K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.causal_conv1d.native import TAPS
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain
from nemotron_h.ops.linear.native import scratch
from nemotron_h.ops.mamba_step.sizes import MambaSizes
from nemotron_h.ops.ssd.native import STATES, TOKENS


def refusal(
    projected_BTX: Tensor, sizes: MambaSizes, conv_weight_CK: Tensor, conv_bias_C: Tensor | None, dt_bias_H: Tensor,
    A_H: Tensor, D_H: Tensor, norm_weight_I: Tensor, window_BCK: Tensor, state_BHPN: Tensor, out_state: Tensor | None,
    record: bool = False,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these arguments; None when it can."""
    weights = (conv_weight_CK, dt_bias_H, D_H, norm_weight_I) if conv_bias_C is None else (
        conv_weight_CK, dt_bias_H, D_H, norm_weight_I, conv_bias_C
    )  # fmt: skip
    states = (state_BHPN,) if out_state is None else (state_BHPN, out_state)
    reason = not_plain(projected_BTX, A_H, window_BCK, *weights, *states)
    if reason is not None:
        return reason
    if projected_BTX.dim() != 3 or conv_weight_CK.dim() != 2:
        return f"projected {list(projected_BTX.shape)} or convolution {list(conv_weight_CK.shape)} lack a dimension"
    batch, tokens, width = projected_BTX.shape
    if not 1 <= tokens <= TOKENS or batch == 0:
        return f"the kernel takes 1 to {TOKENS} tokens, not {tokens}"
    if sizes.state > STATES or conv_weight_CK.shape[1] not in TAPS:
        return f"the kernel takes states up to {STATES} and {TAPS[0]} to {TAPS[-1]} taps"
    expected = (batch, sizes.heads, sizes.head_dim, sizes.state)
    if width != sizes.inner + sizes.channels + sizes.heads or any(state.shape != expected for state in states):
        return f"projected {list(projected_BTX.shape)} and state {list(state_BHPN.shape)} do not fit {sizes}"
    heads, bias_shape = (sizes.heads,), None if conv_bias_C is None else tuple(conv_bias_C.shape)
    if not dt_bias_H.shape == A_H.shape == D_H.shape == heads or norm_weight_I.shape != (sizes.inner,):
        return f"dt_bias, A, D or norm weight do not fit {sizes}"
    if conv_weight_CK.shape[0] != sizes.channels or bias_shape not in (None, (sizes.channels,)):
        return f"convolution {list(conv_weight_CK.shape)} or its bias do not fit {sizes}"
    if sizes.groups < 1 or sizes.heads % sizes.groups:
        return f"{sizes.heads} heads do not split into {sizes.groups} groups"
    if projected_BTX.dtype not in DTYPE_CODES or window_BCK.dtype != projected_BTX.dtype:
        return f"the kernel takes float32 and bfloat16, window and x alike, not {projected_BTX.dtype}"
    if A_H.dtype != torch.float32 or any(tensor.dtype not in DTYPE_CODES for tensor in (*weights, *states)):
        return "the kernel takes float32 and bfloat16 weights and states"
    if not all(tensor.is_contiguous() for tensor in (projected_BTX, A_H, *weights[1:], *states)):
        return "a tensor is not contiguous"
    if conv_weight_CK.stride() != (conv_weight_CK.shape[1], 1) or window_BCK.shape != (
        batch, sizes.channels, conv_weight_CK.shape[1] - 1
    ):  # fmt: skip
        return f"window {list(window_BCK.shape)} or convolution {list(conv_weight_CK.shape)} do not fit {sizes}"
    return None


def mamba_step(
    projected_BTX: Tensor, sizes: MambaSizes, conv_weight_CK: Tensor, conv_bias_C: Tensor | None, dt_bias_H: Tensor,
    A_H: Tensor, D_H: Tensor, norm_weight_I: Tensor, window_BCK: Tensor, state_BHPN: Tensor, out_state: Tensor | None,
    record: bool = False, level: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `nemotron_h.ops.mamba_step.mamba_step`; valid only where `refusal` is None."""
    batch, tokens, _ = projected_BTX.shape
    taps = conv_weight_CK.shape[1]
    output_BTI = projected_BTX.new_empty(batch, tokens, sizes.inner)
    window_BKC = projected_BTX.new_empty(batch, taps - 1, sizes.channels)
    out = torch.empty_like(state_BHPN, dtype=torch.float32) if out_state is None else out_state
    bias, bias_dtype = (0, torch.float32) if conv_bias_C is None else (conv_bias_C.data_ptr(), conv_bias_C.dtype)
    recorded = record_buffers(projected_BTX, batch, tokens, sizes.channels, sizes.heads) if record else ()
    threads.sync()
    work = scratch(4 * batch * tokens * (sizes.channels + sizes.heads + sizes.inner) + 256)
    _native.kernels(level).mamba_step(
        projected_BTX.data_ptr(), conv_weight_CK.data_ptr(), bias, dt_bias_H.data_ptr(), A_H.data_ptr(),
        D_H.data_ptr(), norm_weight_I.data_ptr(), window_BCK.data_ptr(), state_BHPN.data_ptr(), out.data_ptr(),
        output_BTI.data_ptr(), window_BKC.data_ptr(), batch, tokens, sizes.heads, sizes.head_dim, sizes.groups,
        sizes.state, taps, *window_BCK.stride(), *sizes.limit, sizes.eps,
        *(DTYPE_CODES[t] for t in (
            projected_BTX.dtype, conv_weight_CK.dtype, bias_dtype, dt_bias_H.dtype, D_H.dtype, norm_weight_I.dtype,
            state_BHPN.dtype, out.dtype,
        )),
        *addresses(recorded), work.data_ptr(),
    )  # fmt: skip
    return output_BTI, window_BKC.transpose(1, 2), out, *recorded


def record_buffers(like: Tensor, batch: int, tokens: int, channels: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for `inputs`, `convolved` and `steps` of a recorded step, in the dtype and on the device of `like`."""
    wide = like.new_empty(batch, tokens, channels), like.new_empty(batch, tokens, channels)
    return *wide, like.new_empty(batch, tokens, heads, dtype=torch.float32)


def addresses(recorded: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """What the kernel takes for them; zeros for none."""
    if not recorded:
        return 0, 0, 0
    inputs_BTC, convolved_BTC, steps_BTH = recorded
    return inputs_BTC.data_ptr(), convolved_BTC.data_ptr(), steps_BTH.data_ptr()
