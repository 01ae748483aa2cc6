"""Linear layers by the C++ kernel (csrc/kernels/linear.cpp), on the CPU, without grad.

Letters: M rows · N output width · K input width.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain
from nemotron_h.quantization import Packing

MOST_ROWS = 8  # of plain weights: PyTorch's product is made for many rows
ACTIVATION_CODES = {"identity": 0, "relu2": 1}  # csrc/kernels.h: Activation
ARITHMETIC_CODES = {"int8": 0, "float32": 1}  # csrc/kernels.h: Arithmetic

# Bytes of scratch that a thread keeps from call to call: 512 tokens that visit 6 experts each need 63 MB, and to get
# them from the system page by page, for every layer, takes a tenth of a prompt's time.
_KEPT = 96 << 20
_local = threading.local()


def refusal(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, activation: str, wide: bool) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = _refused(x, weight_NK, bias_N, activation)
    if reason is not None:
        return reason
    if weight_NK.dtype != x.dtype:
        return f"weight and x must have one dtype, not {weight_NK.dtype} with {x.dtype}"
    if weight_NK.dim() != 2 or x.shape[-1] != weight_NK.shape[1] or weight_NK.numel() == 0:
        return f"weight {list(weight_NK.shape)} does not fit x {list(x.shape)}"
    if weight_NK.stride(1) != 1 and weight_NK.shape[1] != 1:
        return "the rows of weight are not contiguous"
    if bias_N is not None and bias_N.shape[0] != weight_NK.shape[0]:
        return f"bias {list(bias_N.shape)} does not fit weight {list(weight_NK.shape)}"
    if x.numel() > MOST_ROWS * x.shape[-1]:
        return f"it has more than {MOST_ROWS} rows"
    return None


def packed_refusal(
    x: Tensor, packed: Tensor, packing: Packing, out_features: int, bias_N: Tensor | None, arithmetic: str,
    activation: str, wide: bool,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these arguments; None when it can."""
    reason = _refused(x, packed, bias_N, activation)
    if reason is not None:
        return reason
    if arithmetic not in ARITHMETIC_CODES:
        return f"arithmetic={arithmetic!r} is not one of {', '.join(ARITHMETIC_CODES)}"
    if packed.dtype != torch.uint8 or packed.shape != packing.shape(out_features, x.shape[-1]):
        return f"packed weights {list(packed.shape)} do not fit {packing.name} {out_features} x {x.shape[-1]}"
    if not packed.is_contiguous():
        return "the packed weights are not contiguous"
    if bias_N is not None and bias_N.shape[0] != out_features:
        return f"bias {list(bias_N.shape)} does not fit {out_features} outputs"
    return None


def _refused(x: Tensor, weight: Tensor, bias_N: Tensor | None, activation: str) -> str | None:
    reason = not_plain(x, weight) if bias_N is None else not_plain(x, weight, bias_N)
    if reason is not None:
        return reason
    if activation not in ACTIVATION_CODES:
        return f"the kernel's activations are {', '.join(ACTIVATION_CODES)}, not {activation}"
    if x.dtype not in DTYPE_CODES or x.dim() == 0 or x.numel() == 0:
        return f"the kernel takes float32 and bfloat16 rows, not {x.dtype} {list(x.shape)}"
    if bias_N is not None and (bias_N.dtype not in DTYPE_CODES or bias_N.dim() != 1 or not bias_N.is_contiguous()):
        return f"the kernel takes a contiguous float32 or bfloat16 bias, not {bias_N.dtype} {list(bias_N.shape)}"
    return None


def linear(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, activation: str = "identity", wide: bool = False,
    level: str | None = None,
) -> Tensor:  # fmt: skip
    """See `nemotron_h.ops.linear.linear`; valid only where `refusal` is None. `level`: default, the level in force."""
    code, (rows, cols) = DTYPE_CODES[weight_NK.dtype], weight_NK.shape
    return _run(x, weight_NK, code, weight_NK.stride(0), rows, cols, 0, 0, "float32", bias_N, activation, wide, level)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    packing: Packing,
    out_features: int,
    bias_N: Tensor | None,
    arithmetic: str,
    activation: str = "identity",
    wide: bool = False,
    level: str | None = None,
) -> Tensor:
    """See `nemotron_h.ops.linear.packed_linear`; valid only where `packed_refusal` is None."""
    cols, scale = x.shape[-1], packing.scale_code
    return _run(
        x,
        packed,
        packing.code,
        0,
        out_features,
        cols,
        packing.group,
        scale,
        arithmetic,
        bias_N,
        activation,
        wide,
        level,
    )


def _run(
    x: Tensor, weight: Tensor, code: int, stride: int, rows: int, cols: int, group: int, scale: int, arithmetic: str,
    bias_N: Tensor | None, activation: str, wide: bool, level: str | None,
) -> Tensor:  # fmt: skip
    x, x_stride = in_rows(x)
    count, exact = x.numel() // cols, ARITHMETIC_CODES[arithmetic]
    out = x.new_empty(*x.shape[:-1], rows, dtype=torch.float32 if wide else x.dtype)
    threads.sync()
    work = scratch(_native.extension().linear_scratch(count, cols, code, exact))
    bias = (0, 0) if bias_N is None else (bias_N.data_ptr(), DTYPE_CODES[bias_N.dtype])
    dtype = DTYPE_CODES[x.dtype]
    _native.kernels(level).linear(
        x.data_ptr(), dtype, x_stride, count, weight.data_ptr(), code, stride, rows, cols, group, scale, exact, *bias,
        ACTIVATION_CODES[activation], out.data_ptr(), DTYPE_CODES[out.dtype], rows, work.data_ptr(),
    )  # fmt: skip
    return out


def in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., K], copied if its rows are not contiguous and at one distance, and that distance in elements."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


def scratch(size: int) -> Tensor:
    """At least `size` bytes for the time of one kernel call, aligned to 64; the thread's own, not to be kept."""
    if size > _KEPT:
        return torch.empty(size, dtype=torch.uint8)
    kept = getattr(_local, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = _local.scratch = torch.empty(max(size, 1 << 16), dtype=torch.uint8)
    return kept
