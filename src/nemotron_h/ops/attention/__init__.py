"""Grouped-query attention without positions (numerics.md, "Attention").

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · d head size.
"""

from typing import NamedTuple

from torch import Tensor

from nemotron_h.errors import InputError
from nemotron_h.ops import dispatch
from nemotron_h.ops.attention import native, reference
from nemotron_h.ops.attention.int8 import Int8Rows, quantize

__all__ = ["AttentionResult", "Int8Rows", "attention", "quantize"]


class AttentionResult(NamedTuple):
    """`output` [B, T, Q, d]; `weights` [B, Q, T, S] after the softmax, only when asked for."""

    output: Tensor
    weights: Tensor | None


_SDPA = dispatch.register("attention", reference.attention, native.attention, native.refusal)
# Slack: float32 has scores of 100 only to 1e-5, and a softmax of few keys shows it; whose sum is luckier varies.
_INT8 = dispatch.register(
    "attention_int8", reference.attention_int8, native.attention_int8, native.refusal_int8, slack=8.0
)
_EAGER = dispatch.register("attention_weights", reference.attention_weights)


def attention(
    q_BTQd: Tensor,
    k_BKSd: Tensor | Int8Rows,
    v_BKSd: Tensor | Int8Rows,
    visible: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    *,
    past: int = 0,
    window: int | None = None,
    return_weights: bool = False,
    impl: str | None = None,
) -> AttentionResult:
    """`softmax(q·kᵀ / sqrt(d)) v` with the softmax in float32; query head h uses key head h // (Q/K).

    The kernel takes any number of queries and keys, in bounded memory: no [T, S] matrix exists. A row of its result
    depends on its own query and the keys that it sees, bit for bit: not on the level, the number of queries in the
    call, which other ones they are, or what lies in unseen slots.
    Where its keys lie does count: sums are taken over blocks of 256 slots, which count from slot 0 of `k`, and added
    in that order. The same keys behind other slots, as of a document in a packed row or a row padded on the left,
    agree bit for bit only when these are a multiple of 256, and to rounding elsewhere.

    Args:
        k_BKSd, v_BKSd: Tensors, any strides as long as a position's d channels are contiguous; or both `Int8Rows`.
        visible: Boolean, broadcastable to [B, 1, T, S]: which keys a query sees; every query must see one.
        causal: Instead of `visible`: query t stands at position past + t, behind keys 0 .. past + t, and sees these.
            The keys are those of the past and of the queries themselves, S = past + T.
        past: Keys before those of the first query, with `causal`.
        window: With `causal`, only the last `window` of these keys are seen, its own included; None: all.
        dropout: Probability with which attention weights are dropped.
        return_weights: Form the probabilities explicitly and return them too.

    Raises:
        InputError: one of keys and values is int8, the other not; `causal` with a mask or other numbers of keys, or
            `past` or `window` without it. KernelError: `impl="native"` cannot run.
    """
    if isinstance(k_BKSd, Int8Rows) != isinstance(v_BKSd, Int8Rows):
        raise InputError("attention: keys and values must both be tensors or both Int8Rows; quantize both or neither.")
    if isinstance(k_BKSd, Int8Rows) and isinstance(v_BKSd, Int8Rows):
        if not return_weights:
            y_BTQd = _INT8(q_BTQd, *k_BKSd, *v_BKSd, visible, causal, dropout, past, window, impl=impl)
            return AttentionResult(y_BTQd, None)
        k_BKSd, v_BKSd = k_BKSd.dequantized(q_BTQd.dtype), v_BKSd.dequantized(q_BTQd.dtype)
    op = _EAGER if return_weights else _SDPA
    result = op(q_BTQd, k_BKSd, v_BKSd, visible, causal, dropout, past, window, impl=impl)
    return AttentionResult(*result) if return_weights else AttentionResult(result, None)
