"""Sampling by the C++ kernel (csrc/kernels/sample.cpp): one contiguous float32 row on the CPU.

Letters: V vocabulary.
"""

import threading

import torch
from torch import Tensor

from nemotron_h.ops import _native
from nemotron_h.ops.dispatch import not_plain


def refusal(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = not_plain(logits_V)
    if reason is not None:
        return reason
    if logits_V.dtype != torch.float32:
        return f"the kernel takes float32, not {logits_V.dtype}"
    if logits_V.dim() != 1 or logits_V.shape[0] == 0:
        return f"the logits {list(logits_V.shape)} are no row"
    if not logits_V.is_contiguous():
        return f"the logits (stride {logits_V.stride(0)}) are not contiguous"
    return None


def sample(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float, level: str | None = None
) -> int:
    """See `nemotron_h.ops.sample.sample`; valid only where `refusal` is None. `level`: default, the level in force."""
    size = logits_V.shape[0]
    scratch = _scratch(size)
    return _native.kernels(level).sample(
        logits_V.data_ptr(), size, temperature, top_k, top_p, min_p, u, scratch.data_ptr()
    )


class _Scratch(threading.local):
    """Each thread's working memory, kept: fresh pages would cost more than the kernel does."""

    floats: Tensor | None = None


_kept = _Scratch()


def _scratch(vocabulary: int) -> Tensor:
    needed = 2 * vocabulary + 32  # csrc/kernels.h: sample_scratch
    if _kept.floats is None or _kept.floats.shape[0] < needed:
        _kept.floats = torch.empty(needed, dtype=torch.float32)
    return _kept.floats
