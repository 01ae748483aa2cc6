"""Attention by the C++ kernels, csrc/kernels/attention.cpp (a few queries) and attention_prefill.cpp (many), which give
the same bits: float32 and bfloat16 queries; keys and values in these or in int8; on the CPU, without grad.

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · R = Q/K · d head size.
"""

from array import array

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.attention.places import misplaced
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain

FEW, MAX_SIZE = 8, 256  # queries, channels; csrc/kernels.h: attention_max_queries, attention_max_size
BLOCK = 256  # keys; csrc/kernels/attention.cpp: block


def refusal(
    q_BTQd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    visible: Tensor | None,
    causal: bool,
    dropout: float,
    past: int = 0,
    window: int | None = None,
) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    masks = () if visible is None else (visible,)
    reason = not_plain(q_BTQd, k_BKSd, v_BKSd, *masks)
    if reason is not None:
        return reason
    if k_BKSd.dtype not in DTYPE_CODES or k_BKSd.dtype != v_BKSd.dtype:
        return f"the kernel takes float32 or bfloat16 keys and values, not {k_BKSd.dtype} and {v_BKSd.dtype}"
    return _common_refusal(q_BTQd, k_BKSd, v_BKSd, visible, causal, dropout, past, window)


def refusal_int8(
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
) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    masks = () if visible is None else (visible,)
    reason = not_plain(q_BTQd, k_BKSd, k_scale_BKS, v_BKSd, v_scale_BKS, *masks)
    if reason is not None:
        return reason
    for rows, scale in ((k_BKSd, k_scale_BKS), (v_BKSd, v_scale_BKS)):
        if rows.dtype != torch.int8 or scale.dtype != torch.float32:
            return f"the kernel takes int8 rows with float32 scales, not {rows.dtype} with {scale.dtype}"
        if scale.shape != rows.shape[:3]:
            return f"scales {list(scale.shape)} do not fit rows {list(rows.shape)}"
        if not _dense(scale):
            return f"scales (strides {scale.stride()}) do not lie one after the other"
    return _common_refusal(q_BTQd, k_BKSd, v_BKSd, visible, causal, dropout, past, window)


def _common_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    causal: bool,
    dropout: float,
    past: int,
    window: int | None,
) -> str | None:
    if dropout > 0:
        return "the kernel has no dropout"
    if q.dtype not in DTYPE_CODES:
        return f"the kernel takes float32 or bfloat16 queries, not {q.dtype}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        return f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit"
    if q.numel() == 0 or k.numel() == 0:
        return "there are no queries or no keys"
    if q.shape[2] % k.shape[1]:
        return f"{q.shape[2]} query heads do not share {k.shape[1]} key heads evenly"
    if q.shape[3] > MAX_SIZE:
        return f"the kernel takes heads of at most {MAX_SIZE} channels, not {q.shape[3]}"
    if not _dense(k) or not _dense(v):
        return f"the channels of keys or values (strides {k.stride()}, {v.stride()}) do not lie one after the other"
    reason = misplaced(q.shape[1], k.shape[2], visible, causal, past, window)
    if reason is not None or visible is None:
        return reason
    return _mask_refusal(visible, (q.shape[0], 1, q.shape[1], k.shape[2]))


def _mask_refusal(visible: Tensor, shape: tuple[int, ...]) -> str | None:
    if visible.dtype != torch.bool:
        return f"the mask must be boolean, not {visible.dtype}"
    fits = visible.dim() <= 4 and all(n in (1, m) for n, m in zip(visible.shape[::-1], shape[::-1], strict=False))
    return None if fits else f"the mask {list(visible.shape)} does not broadcast to {list(shape)}"


def _dense(t: Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] == 1


def attention(
    q_BTQd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    visible: Tensor | None,
    causal: bool,
    dropout: float,
    past: int = 0,
    window: int | None = None,
    level: str | None = None,
) -> Tensor:
    """See `nemotron_h.ops.attention.attention`; valid only where `refusal` is None. `level`: default, that in force."""
    del dropout
    return _run(q_BTQd, k_BKSd, None, v_BKSd, None, visible, causal, past, window, level)


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
    level: str | None = None,
) -> Tensor:
    """The same of int8 rows; valid only where `refusal_int8` is None."""
    del dropout
    return _run(q_BTQd, k_BKSd, k_scale_BKS, v_BKSd, v_scale_BKS, visible, causal, past, window, level)


def _run(
    q_BTQd: Tensor,
    k_BKSd: Tensor,
    k_scale_BKS: Tensor | None,
    v_BKSd: Tensor,
    v_scale_BKS: Tensor | None,
    visible: Tensor | None,
    causal: bool,
    past: int,
    window: int | None,
    level: str | None,
) -> Tensor:
    q_BTQd = q_BTQd.contiguous()
    out_BTQd = torch.empty_like(q_BTQd)
    batch, queries, query_heads, size = q_BTQd.shape
    heads, keys = k_BKSd.shape[1:3]
    repeats = query_heads // heads
    seen = None if visible is None else visible.expand(batch, 1, queries, keys)
    threads.sync()
    slots = _native.extension().threads()
    shape = array("Q", (batch, queries, heads, repeats, keys, size, causal, past, window or 0, slots))
    shape.extend((*k_BKSd.stride()[:3], *v_BKSd.stride()[:3]))
    for scale in (k_scale_BKS, v_scale_BKS):
        shape.extend((0, 0) if scale is None else scale.stride()[:2])
    shape.extend((0, 0, 0) if seen is None else seen.stride()[::2] + seen.stride()[3:])
    kernels = _native.kernels(level)
    if queries <= FEW:
        blocks = batch * heads * -(-keys // BLOCK)
        run, floats = kernels.attention, blocks * queries * repeats * (-(-size // 16) * 16 + 2) + 16
    else:
        run, floats = kernels.attention_prefill, _native.extension().attention_prefill_scratch(size, slots)
    scratch = torch.empty(floats + 16, dtype=torch.float32)
    run(
        shape.buffer_info()[0],
        q_BTQd.data_ptr(),
        DTYPE_CODES[q_BTQd.dtype],
        k_BKSd.data_ptr(),
        v_BKSd.data_ptr(),
        DTYPE_CODES.get(k_BKSd.dtype, 0),
        0 if k_scale_BKS is None else k_scale_BKS.data_ptr(),
        0 if v_scale_BKS is None else v_scale_BKS.data_ptr(),
        0 if seen is None else seen.data_ptr(),
        scratch.data_ptr() + -scratch.data_ptr() % 64,
        out_BTQd.data_ptr(),
    )
    return out_BTQd
