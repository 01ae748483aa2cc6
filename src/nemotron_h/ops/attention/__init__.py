"""Grouped-query attention without positions (numerics.md, "Attention").

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · d head size.
"""

from typing import NamedTuple

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.attention import reference


class AttentionResult(NamedTuple):
    """`output` [B, T, Q, d]; `weights` [B, Q, T, S] after the softmax, only when asked for."""

    output: Tensor
    weights: Tensor | None


_SDPA = dispatch.register("attention", reference.attention)
_EAGER = dispatch.register("attention_weights", reference.attention_weights)


def attention(
    q_BTQd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    visible: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    *,
    return_weights: bool = False,
    impl: str | None = None,
) -> AttentionResult:
    """`softmax(q·kᵀ / sqrt(d)) v` with the softmax in float32; query head h uses key head h // (Q/K).

    Args:
        visible: Boolean, broadcastable to [B, 1, T, S]: which keys a query sees; every query must see one.
        causal: Instead of `visible`, with T = S: key j is seen by query i iff j <= i.
        dropout: Probability with which attention weights are dropped.
        return_weights: Form the probabilities explicitly and return them too.
    """
    if return_weights:
        return AttentionResult(*_EAGER(q_BTQd, k_BKSd, v_BKSd, visible, causal, dropout, impl=impl))
    return AttentionResult(_SDPA(q_BTQd, k_BKSd, v_BKSd, visible, causal, dropout, impl=impl), None)
