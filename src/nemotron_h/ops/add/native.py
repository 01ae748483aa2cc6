"""Sums by the C++ kernel (csrc/kernels/add.cpp): float32 and bfloat16 on the CPU, without grad."""

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain


def refusal(x: Tensor, y: Tensor) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = not_plain(x, y)
    if reason is not None:
        return reason
    if x.dtype not in DTYPE_CODES or y.dtype not in DTYPE_CODES or torch.promote_types(x.dtype, y.dtype) != x.dtype:
        return f"the kernel takes float32 and bfloat16, the wider first, not {x.dtype} and {y.dtype}"
    if x.shape != y.shape or x.numel() == 0:
        return f"x {list(x.shape)} and y {list(y.shape)} are empty or of different shapes"
    if not x.is_contiguous() or not y.is_contiguous():
        return f"x or y is not contiguous (strides {x.stride()} and {y.stride()})"
    return None


def add(x: Tensor, y: Tensor, level: str | None = None) -> Tensor:
    """See `nemotron_h.ops.add.add`; valid only where `refusal` is None. `level`: default, the level in force."""
    out = torch.empty_like(x)
    threads.sync()
    _native.kernels(level).add(
        x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel(), DTYPE_CODES[x.dtype], DTYPE_CODES[y.dtype]
    )
    return out
