"""Attention in PyTorch: the specification. Differentiable; any device, `meta` included.

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · R = Q/K · d head size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.errors import InputError
from nemotron_h.ops.attention.int8 import Int8Rows
from nemotron_h.ops.attention.places import misplaced
from nemotron_h.ops.tracing import tracing

BLOCK = 256  # queries that share one span of keys, so that packed documents do not cost the whole [T, S] product


def attention(
    q_BTQd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    visible: Tensor | None,
    causal: bool,
    dropout: float,
    past: int = 0,
    window: int | None = None,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention: no [T, S] matrix is kept. See `nemotron_h.ops.attention.attention`."""
    _check_places(q_BTQd, k_BKSd, visible, causal, past, window)
    repeats = q_BTQd.shape[2] // k_BKSd.shape[1]
    if q_BTQd.shape[1] == 1:  # one query: its R heads per key head are R rows of one product, no key is copied
        first = 0 if window is None else max(0, past + 1 - window)
        q_BKRd = q_BTQd[:, 0].unflatten(1, (-1, repeats))
        y_BKRd = F.scaled_dot_product_attention(
            q_BKRd, k_BKSd[:, :, first:], v_BKSd[:, :, first:], attn_mask=visible, dropout_p=dropout
        )
        return y_BKRd.flatten(1, 2)[:, None]
    k_BQSd, v_BQSd = k_BKSd.repeat_interleave(repeats, dim=1), v_BKSd.repeat_interleave(repeats, dim=1)
    q_BQTd = q_BTQd.transpose(1, 2)
    if causal and (past or window is not None):
        y_BQTd = _behind(q_BQTd, k_BQSd, v_BQSd, dropout, past, window)
    elif visible is None or q_BTQd.shape[1] <= BLOCK or not _readable(visible):
        y_BQTd = F.scaled_dot_product_attention(
            q_BQTd, k_BQSd, v_BQSd, attn_mask=visible, dropout_p=dropout, is_causal=causal
        )
    else:
        parts = zip(q_BQTd.split(BLOCK, dim=2), visible.split(BLOCK, dim=2), strict=True)
        y_BQTd = torch.cat([_block(q, k_BQSd, v_BQSd, seen, dropout) for q, seen in parts], dim=2)
    return y_BQTd.transpose(1, 2)


def _check_places(
    q_BTQd: Tensor, k_BKSd: Tensor, visible: Tensor | None, causal: bool, past: int, window: int | None
) -> None:
    reason = misplaced(q_BTQd.shape[1], k_BKSd.shape[2], visible, causal, past, window)
    if reason is not None:
        raise InputError(f"attention: {reason}.")


def _seen(queries: int, keys: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the first keys [T, S] queries at positions past .. past + T - 1 see."""
    age_TS = torch.arange(past, past + queries, device=device)[:, None] - torch.arange(keys, device=device)
    return age_TS >= 0 if window is None else (age_TS >= 0) & (age_TS < window)


def _behind(q_BQTd: Tensor, k_BQSd: Tensor, v_BQSd: Tensor, dropout: float, past: int, window: int | None) -> Tensor:
    """Causal attention behind a past or within a window: one mask at a time, of a block of queries and its keys."""
    queries, parts = q_BQTd.shape[2], []
    step = queries if tracing() else BLOCK
    for t in range(0, queries, step):
        q_BQbd = q_BQTd[:, :, t : t + step]
        first, end = 0 if window is None else max(0, past + t + 1 - window), past + t + q_BQbd.shape[2]
        seen = _seen(q_BQbd.shape[2], end - first, past + t - first, window, q_BQTd.device)
        k, v = k_BQSd[:, :, first:end], v_BQSd[:, :, first:end]
        parts.append(F.scaled_dot_product_attention(q_BQbd, k, v, attn_mask=seen, dropout_p=dropout))
    return torch.cat(parts, dim=2)


def _readable(visible: Tensor) -> bool:
    """Whether looking at the mask's values is possible and free."""
    return visible.is_cpu and type(visible) is Tensor and not tracing()


def _block(q_BQbd: Tensor, k_BQSd: Tensor, v_BQSd: Tensor, visible: Tensor, dropout: float) -> Tensor:
    """Attention of a block of queries to the span of keys that any of them sees."""
    seen = visible.flatten(0, -2).any(0).nonzero()
    low, high = int(seen[0]), int(seen[-1]) + 1
    k_BQSd, v_BQSd = k_BQSd[:, :, low:high], v_BQSd[:, :, low:high]
    return F.scaled_dot_product_attention(q_BQbd, k_BQSd, v_BQSd, attn_mask=visible[..., low:high], dropout_p=dropout)


def attention_int8(
    q_BTQd: Tensor,
    k_BKSd: Tensor,
    k_scale_BKS: Tensor,
    v_BKSd: Tensor,
    v_scale_BKS: Tensor,
    visible: Tensor | None,
    causal: bool,
    dropout: float,
    past: int = 0,
    window: int | None = None,
) -> Tensor:
    """Of int8 rows [B, K, S, d] times scales [B, K, S]: in the queries' dtype."""
    k_BKSd, v_BKSd = (
        Int8Rows(rows, scale).dequantized(q_BTQd.dtype)
        for rows, scale in ((k_BKSd, k_scale_BKS), (v_BKSd, v_scale_BKS))
    )
    return attention(q_BTQd, k_BKSd, v_BKSd, visible, causal, dropout, past, window)


def attention_weights(
    q_BTQd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    visible: Tensor | None,
    causal: bool,
    dropout: float,
    past: int = 0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same from explicit probabilities, which are returned before dropout."""
    _check_places(q_BTQd, k_BKSd, visible, causal, past, window)
    dtype = torch.promote_types(q_BTQd.dtype, torch.float32)
    queries, _, size = q_BTQd.shape[1:]
    q_BKRTd = q_BTQd.transpose(1, 2).unflatten(1, (k_BKSd.shape[1], -1)).to(dtype)
    scores_BKRTS = q_BKRTd @ k_BKSd.to(dtype)[:, :, None].transpose(-1, -2) * size**-0.5
    if causal:
        visible = _seen(queries, k_BKSd.shape[2], past, window, q_BTQd.device)
    scores_BQTS = scores_BKRTS.flatten(1, 2)
    if visible is not None:
        scores_BQTS = scores_BQTS.masked_fill(~visible, -torch.inf)
    weights_BQTS = scores_BQTS.softmax(-1)
    dropped = F.dropout(weights_BQTS, dropout).unflatten(1, (k_BKSd.shape[1], -1))
    y_BQTd = (dropped @ v_BKSd.to(dtype)[:, :, None]).flatten(1, 2)
    return y_BQTd.transpose(1, 2).to(q_BTQd.dtype), weights_BQTS.to(q_BTQd.dtype)
