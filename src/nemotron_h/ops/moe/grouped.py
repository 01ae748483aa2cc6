"""Routed experts by `torch._grouped_mm`: no copy of weights, so it is what training in float32 and bfloat16 takes.

Letters: M tokens · k experts per token · V = M·k visits · L, F widths · E experts.
"""

import torch
from torch import Tensor

from nemotron_h.ops.activations import activation as by_name
from nemotron_h.ops.moe.combine import weighted_sum
from nemotron_h.ops.tracing import tracing

_MIN_VISITS = 32  # below, the sort costs more than it saves


def refusal(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up_EFL: Tensor, down_ELF: Tensor, *_: object
) -> str | None:
    """Why `torch._grouped_mm` cannot take this call or would be slower; None when it should."""
    if not hasattr(torch, "_grouped_mm"):
        return "this torch has no _grouped_mm"
    if tracing() or type(x_ML) is not Tensor:
        return "tracing, functorch transforms and fake tensors take the reference"
    if x_ML.dtype not in (torch.float32, torch.bfloat16) or up_EFL.dtype != x_ML.dtype or down_ELF.dtype != x_ML.dtype:
        return f"it takes float32 and bfloat16, not {x_ML.dtype} with {up_EFL.dtype}"
    if x_ML.is_meta or any(size * x_ML.element_size() % 16 for size in up_EFL.shape[1:]):
        return "rows must be multiples of 16 bytes and have memory"
    if experts_Mk.numel() < _MIN_VISITS:
        return "a few visits are faster in the reference"
    return None


def experts(
    x_ML: Tensor,
    experts_Mk: Tensor,
    weights_Mk: Tensor,
    up_EFL: Tensor,
    down_ELF: Tensor,
    activation: str,
    up_bias_EF: Tensor | None,
    down_bias_EL: Tensor | None,
) -> Tensor:
    """See `nemotron_h.ops.moe.experts`; valid only where `refusal` is None."""
    expert_V = experts_Mk.flatten()
    order_V = expert_V.argsort(stable=True)
    sorted_V = expert_V[order_V]
    ends_E = torch.searchsorted(sorted_V, torch.arange(up_EFL.shape[0], device=x_ML.device), right=True).int()
    x_VL = x_ML[order_V // experts_Mk.shape[1]]
    h_VF = torch._grouped_mm(x_VL, up_EFL.transpose(1, 2), offs=ends_E)
    if up_bias_EF is not None:
        h_VF = h_VF + up_bias_EF[sorted_V]
    y_VL = torch._grouped_mm(by_name(activation)(h_VF), down_ELF.transpose(1, 2), offs=ends_E)
    if down_bias_EL is not None:
        y_VL = y_VL + down_bias_EL[sorted_V]
    in_token_order = torch.zeros_like(y_VL).index_copy(0, order_V, y_VL)
    return weighted_sum(in_token_order, weights_Mk).to(x_ML.dtype)
