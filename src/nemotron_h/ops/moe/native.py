"""Routed experts by the C++ kernel (csrc/kernels/experts.cpp), on the CPU, without grad.

Letters: M tokens · L width in which experts work · F expert width · E experts · k per token · n panels of 16 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.errors import InputError
from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain
from nemotron_h.ops.linear.native import ARITHMETIC_CODES, MOST_ROWS, in_rows, scratch
from nemotron_h.quantization import Packing


def refusal(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up_EFL: Tensor, down_ELF: Tensor, activation: str,
    up_bias_EF: Tensor | None, down_bias_EL: Tensor | None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these arguments; None when it can."""
    reason = _refused(x_ML, experts_Mk, weights_Mk, up_EFL, down_ELF, activation, up_bias_EF, down_bias_EL)
    if reason is not None:
        return reason
    if up_EFL.dtype != x_ML.dtype or down_ELF.dtype != x_ML.dtype:
        return f"weights and x must have one dtype, not {up_EFL.dtype} with {x_ML.dtype}"
    if up_EFL.dim() != 3 or up_EFL.shape[2] != x_ML.shape[1] or down_ELF.shape != up_EFL.transpose(1, 2).shape:
        return f"experts {list(up_EFL.shape)} and {list(down_ELF.shape)} do not fit x {list(x_ML.shape)}"
    if x_ML.shape[0] > MOST_ROWS:
        return f"it has more than {MOST_ROWS} tokens"
    return _wrong_stacks(up_EFL, down_ELF, up_bias_EF, down_bias_EL, *up_EFL.shape[1:])


def packed_refusal(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up: Tensor, down: Tensor, packing: Packing, width: int,
    activation: str, up_bias_EF: Tensor | None, down_bias_EL: Tensor | None, arithmetic: str,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these arguments; None when it can."""
    reason = _refused(x_ML, experts_Mk, weights_Mk, up, down, activation, up_bias_EF, down_bias_EL)
    if reason is not None:
        return reason
    if arithmetic not in ARITHMETIC_CODES:
        return f"arithmetic={arithmetic!r} is not one of {', '.join(ARITHMETIC_CODES)}"
    if up.dtype != torch.uint8 or down.dtype != torch.uint8:
        return f"packed experts are uint8, not {up.dtype} and {down.dtype}"
    latent = x_ML.shape[1]
    if up.shape[1:] != packing.shape(width, latent) or down.shape[1:] != packing.shape(latent, width):
        return f"packed experts {list(up.shape)} and {list(down.shape)} do not fit {packing.name} {width} x {latent}"
    return _wrong_stacks(up, down, up_bias_EF, down_bias_EL, width, latent)


def _refused(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up: Tensor, down: Tensor, activation: str,
    up_bias_EF: Tensor | None, down_bias_EL: Tensor | None,
) -> str | None:  # fmt: skip
    biases = [bias for bias in (up_bias_EF, down_bias_EL) if bias is not None]
    reason = not_plain(x_ML, experts_Mk, weights_Mk, up, down, *biases)
    if reason is not None:
        return reason
    if activation != "relu2":
        return f"the kernel's activation is relu2, not {activation}"
    if x_ML.dtype not in DTYPE_CODES or x_ML.numel() == 0 or x_ML.dim() != 2:
        return f"the kernel takes float32 and bfloat16 rows, not {x_ML.dtype} {list(x_ML.shape)}"
    visits = experts_Mk.shape
    if experts_Mk.dtype != torch.int64 or visits != weights_Mk.shape or visits[:1] != x_ML.shape[:1]:
        return f"experts {experts_Mk.dtype} {list(visits)} do not fit x {list(x_ML.shape)}"
    if experts_Mk.dim() != 2 or visits[1] == 0 or not weights_Mk.is_floating_point():
        return f"the kernel takes ids [M, k] and floating weights, not {list(visits)} and {weights_Mk.dtype}"
    if not up.is_contiguous() or not down.is_contiguous() or up.numel() == 0:
        return "the experts' weights are empty or not contiguous"
    return None


def _wrong_stacks(
    up: Tensor, down: Tensor, up_bias_EF: Tensor | None, down_bias_EL: Tensor | None, width: int, latent: int
) -> str | None:
    if len(up) != len(down):
        return f"{len(up)} experts' up and {len(down)} experts' down do not fit each other"
    for bias_EX, outputs in ((up_bias_EF, width), (down_bias_EL, latent)):
        if bias_EX is not None and bias_EX.shape != (len(up), outputs):
            return f"bias {list(bias_EX.shape)} must be {[len(up), outputs]}"
    return None


def experts(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up_EFL: Tensor, down_ELF: Tensor, activation: str,
    up_bias_EF: Tensor | None, down_bias_EL: Tensor | None, level: str | None = None,
) -> Tensor:  # fmt: skip
    """See `nemotron_h.ops.moe.experts`; valid only where `refusal` is None."""
    code, width = DTYPE_CODES[up_EFL.dtype], up_EFL.shape[1]
    return _run(x_ML, experts_Mk, weights_Mk, up_EFL, down_ELF, (code, 0, 0, 1), width, up_bias_EF, down_bias_EL, level)


def packed_experts(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up: Tensor, down: Tensor, packing: Packing, width: int,
    activation: str, up_bias_EF: Tensor | None, down_bias_EL: Tensor | None, arithmetic: str, level: str | None = None,
) -> Tensor:  # fmt: skip
    """See `nemotron_h.ops.moe.packed_experts`; valid only where `packed_refusal` is None."""
    form = (packing.code, packing.group, packing.scale_code, ARITHMETIC_CODES[arithmetic])
    return _run(x_ML, experts_Mk, weights_Mk, up, down, form, width, up_bias_EF, down_bias_EL, level)


def _run(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up: Tensor, down: Tensor, form: tuple[int, int, int, int],
    width: int, up_bias_EF: Tensor | None, down_bias_EL: Tensor | None, level: str | None,
) -> Tensor:  # fmt: skip
    x_ML, stride = in_rows(x_ML)
    tokens, latent = x_ML.shape
    count, k, dtype = len(up), experts_Mk.shape[1], DTYPE_CODES[x_ML.dtype]
    ids, weights = experts_Mk.contiguous(), weights_Mk.float().contiguous()
    biases = [None if bias is None else bias.float().contiguous() for bias in (up_bias_EF, down_bias_EL)]
    out = torch.empty_like(x_ML, memory_format=torch.contiguous_format)
    threads.sync()
    work = scratch(_native.extension().experts_scratch(tokens, k, count, latent, width, form[0], form[3]))
    legal = _native.kernels(level).experts(
        x_ML.data_ptr(), dtype, stride, tokens, k, count, ids.data_ptr(), weights.data_ptr(),
        up.data_ptr(), up.stride(0) * up.element_size(), down.data_ptr(), down.stride(0) * down.element_size(),
        *form, latent, width, *(0 if bias is None else bias.data_ptr() for bias in biases),
        out.data_ptr(), dtype, work.data_ptr(),
    )  # fmt: skip
    if not legal:
        raise InputError(f"expert ids must lie in [0, {count}), got {int(ids.min())} to {int(ids.max())}")
    return out
