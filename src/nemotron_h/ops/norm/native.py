"""RMSNorm, plain and gated, by the C++ kernels (csrc/kernels/rms_norm.cpp, gated_rms_norm.cpp): float32 and bfloat16 on
the CPU, without grad."""

from itertools import pairwise

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain


def refusal(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = not_plain(x, weight)
    if reason is not None:
        return reason
    if x.dtype not in DTYPE_CODES or weight.dtype not in DTYPE_CODES:
        return f"the kernel takes float32 and bfloat16, not {x.dtype} with {weight.dtype}"
    if x.dim() == 0 or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        return f"weight {list(weight.shape)} does not fit x {list(x.shape)}"
    if x.numel() == 0:
        return "x is empty"
    if not weight.is_contiguous():
        return "weight is not contiguous"
    if _row_stride(x) is None:
        return f"the rows of x (strides {x.stride()}) are not contiguous or not at one distance"
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, level: str | None = None) -> Tensor:
    """See `nemotron_h.ops.norm.rms_norm`; valid only where `refusal` is None. `level`: default, the level in force."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    cols = weight.shape[0]
    stride = _row_stride(x)
    assert stride is not None  # refusal() looked
    threads.sync()
    _native.kernels(level).rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // cols,
        cols,
        stride,
        eps,
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[weight.dtype],
    )
    return out


def gated_refusal(y: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> str | None:
    """Why the gated kernel cannot take these arguments; None when it can."""
    reason = not_plain(y, z, weight)
    if reason is not None:
        return reason
    if not {y.dtype, z.dtype, weight.dtype} <= DTYPE_CODES.keys():
        return f"the kernel takes float32 and bfloat16, not {y.dtype}, {z.dtype} and {weight.dtype}"
    if y.shape != z.shape or y.dim() == 0 or weight.shape != y.shape[-1:]:
        return f"y {list(y.shape)}, z {list(z.shape)} and weight {list(weight.shape)} do not fit"
    if y.numel() == 0:
        return "y is empty"
    if n_groups < 1 or y.shape[-1] % n_groups:
        return f"{y.shape[-1]} channels do not split into {n_groups} groups"
    if not weight.is_contiguous():
        return "weight is not contiguous"
    for x in (y, z):
        if _row_stride(x) is None:
            return f"the rows of y or z (strides {x.stride()}) are not contiguous or not at one distance"
    return None


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int, level: str | None = None) -> Tensor:
    """See `nemotron_h.ops.norm.gated_rms_norm`; valid only where `gated_refusal` is None."""
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    width = weight.shape[0]
    y_stride, z_stride = _row_stride(y), _row_stride(z)
    assert y_stride is not None  # gated_refusal() looked
    assert z_stride is not None
    threads.sync()
    _native.kernels(level).gated_rms_norm(
        y.data_ptr(), z.data_ptr(), weight.data_ptr(), out.data_ptr(), y.numel() // width, n_groups, width // n_groups,
        y_stride, z_stride, eps, DTYPE_CODES[y.dtype], DTYPE_CODES[z.dtype], DTYPE_CODES[weight.dtype],
    )  # fmt: skip
    return out


def _row_stride(x: Tensor) -> int | None:
    """Elements from row to row when all rows of x [..., D] are contiguous and lie at one distance, else None."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return None
    leading = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    if any(outer != n * inner for (_, outer), (n, inner) in pairwise(leading)):
        return None
    return leading[-1][1] if leading else x.shape[-1]
