"""Attention in PyTorch: the specification. Differentiable; any device, `meta` included.

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · R = Q/K · d head size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    q_BTQd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, visible: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """PyTorch's scaled_dot_product_attention: no [T, S] matrix is kept. See `nemotron_h.ops.attention.attention`."""
    repeats = q_BTQd.shape[2] // k_BKSd.shape[1]
    if q_BTQd.shape[1] == 1:  # one query: its R heads per key head are R rows of one product, no key is copied
        q_BKRd = q_BTQd[:, 0].unflatten(1, (-1, repeats))
        y_BKRd = F.scaled_dot_product_attention(q_BKRd, k_BKSd, v_BKSd, attn_mask=visible, dropout_p=dropout)
        return y_BKRd.flatten(1, 2)[:, None]
    k_BQSd, v_BQSd = k_BKSd.repeat_interleave(repeats, dim=1), v_BKSd.repeat_interleave(repeats, dim=1)
    q_BQTd = q_BTQd.transpose(1, 2)
    y_BQTd = F.scaled_dot_product_attention(
        q_BQTd, k_BQSd, v_BQSd, attn_mask=visible, dropout_p=dropout, is_causal=causal
    )
    return y_BQTd.transpose(1, 2)


def attention_weights(
    q_BTQd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, visible: Tensor | None, causal: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """The same from explicit probabilities, which are returned before dropout."""
    dtype = torch.promote_types(q_BTQd.dtype, torch.float32)
    queries, _, size = q_BTQd.shape[1:]
    q_BKRTd = q_BTQd.transpose(1, 2).unflatten(1, (k_BKSd.shape[1], -1)).to(dtype)
    scores_BKRTS = q_BKRTd @ k_BKSd.to(dtype)[:, :, None].transpose(-1, -2) * size**-0.5
    if causal:
        visible = torch.ones(queries, queries, dtype=torch.bool, device=q_BTQd.device).tril()
    scores_BQTS = scores_BKRTS.flatten(1, 2)
    if visible is not None:
        scores_BQTS = scores_BQTS.masked_fill(~visible, -torch.inf)
    weights_BQTS = scores_BQTS.softmax(-1)
    dropped = F.dropout(weights_BQTS, dropout).unflatten(1, (k_BKSd.shape[1], -1))
    y_BQTd = (dropped @ v_BKSd.to(dtype)[:, :, None]).flatten(1, 2)
    return y_BQTd.transpose(1, 2).to(q_BTQd.dtype), weights_BQTS.to(q_BTQd.dtype)
