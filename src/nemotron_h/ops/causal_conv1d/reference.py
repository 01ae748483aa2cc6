"""Causal depthwise convolution in PyTorch: the specification. Differentiable; any device, `meta` included.

Letters: B batch · T tokens · C channels · K taps · S = T + K - 1.
"""

import torch
from torch import Tensor

from nemotron_h.ops.activations import activation as by_name


def causal_conv1d(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    activation: str,
    window_BCK: Tensor | None,
    lengths_B: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `nemotron_h.ops.causal_conv1d.causal_conv1d`."""
    tokens, taps = x_BTC.shape[1], weight_CK.shape[1]
    x_BSC = _with_past(x_BTC, window_BCK, taps - 1)
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    wide_BSC, weight_CK = x_BSC.to(dtype), weight_CK.to(dtype)
    y_BTC = torch.zeros_like(x_BTC, dtype=dtype) if bias_C is None else bias_C.to(dtype).expand_as(x_BTC)
    for tap in range(taps):
        term_BTC = wide_BSC[:, tap : tap + tokens] * weight_CK[:, tap]
        if seq_idx_BT is not None and tap < taps - 1:
            term_BTC = torch.where(_same_document(seq_idx_BT, taps - 1 - tap)[..., None], term_BTC, 0)
        y_BTC = y_BTC + term_BTC
    return by_name(activation)(y_BTC).to(x_BTC.dtype), _last_inputs(x_BSC, taps - 1, tokens, lengths_B)


def next_window(x_BTC: Tensor, window_BCK: Tensor | None, width: int, lengths_B: Tensor | None) -> Tensor:
    """The last `width` inputs up to the end of each row, [B, C, width], without the convolution."""
    return _last_inputs(_with_past(x_BTC, window_BCK, width), width, x_BTC.shape[1], lengths_B)


def _with_past(x_BTC: Tensor, window_BCK: Tensor | None, width: int) -> Tensor:
    batch, _, channels = x_BTC.shape
    past = x_BTC.new_zeros(batch, width, channels) if window_BCK is None else window_BCK.transpose(1, 2).to(x_BTC)
    return torch.cat([past, x_BTC], dim=1)


def _same_document(seq_idx_BT: Tensor, distance: int) -> Tensor:
    """Whether the token `distance` back is in the same document; inputs before the first token belong to the first."""
    first_B1 = seq_idx_BT[:, :1]
    shifted_BT = torch.cat([first_B1.expand(-1, distance), seq_idx_BT], dim=1)[:, : seq_idx_BT.shape[1]]
    return shifted_BT == seq_idx_BT


def _last_inputs(x_BSC: Tensor, width: int, tokens: int, lengths_B: Tensor | None) -> Tensor:
    if lengths_B is None:  # copied: a cache that keeps the window must not keep the whole pass
        return x_BSC[:, tokens : tokens + width].transpose(1, 2).contiguous()
    index_BK = lengths_B[:, None] + torch.arange(width, device=x_BSC.device)
    return x_BSC.gather(1, index_BK[..., None].expand(-1, -1, x_BSC.shape[2])).transpose(1, 2)
