"""The router by the C++ kernel (csrc/kernels/router.cpp), on the CPU, without grad.

Letters: M tokens · D hidden size · E experts · k experts per token.
"""

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain

MOST_EXPERTS = 512  # csrc/kernels.h: router_experts


def refusal(
    x_MD: Tensor,
    weight_ED: Tensor,
    correction_bias_E: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = not_plain(x_MD, weight_ED, correction_bias_E)
    if reason is not None:
        return reason
    if x_MD.dtype not in DTYPE_CODES or weight_ED.dtype not in DTYPE_CODES:
        return f"the kernel takes float32 and bfloat16, not {x_MD.dtype} with {weight_ED.dtype}"
    if correction_bias_E.dtype != torch.float32:
        return f"the correction bias is {correction_bias_E.dtype}, not float32"
    if x_MD.dim() != 2 or weight_ED.dim() != 2 or x_MD.shape[1] != weight_ED.shape[1]:
        return f"weight {list(weight_ED.shape)} does not fit x {list(x_MD.shape)}"
    experts = weight_ED.shape[0]
    if correction_bias_E.shape != (experts,):
        return f"the correction bias {list(correction_bias_E.shape)} does not fit {experts} experts"
    if x_MD.numel() == 0:
        return f"x {list(x_MD.shape)} is empty"
    if experts > MOST_EXPERTS:
        return f"{experts} experts are more than {MOST_EXPERTS}"
    if not 1 <= top_k <= experts:
        return f"top_k={top_k} is not in 1 to {experts}"
    if n_group < 1 or experts % n_group or not 1 <= topk_group <= n_group:
        return f"topk_group={topk_group} of n_group={n_group} does not fit {experts} experts"
    if not weight_ED.is_contiguous() or not correction_bias_E.is_contiguous():
        return "weight or correction bias is not contiguous"
    if x_MD.shape[1] > 1 and x_MD.stride(1) != 1:
        return f"the rows of x (strides {x_MD.stride()}) are not contiguous"
    return None


def route(
    x_MD: Tensor,
    weight_ED: Tensor,
    correction_bias_E: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
    level: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nemotron_h.ops.router.route`; valid only where `refusal` is None. `level`: default, the level in force."""
    tokens, experts = x_MD.shape[0], weight_ED.shape[0]
    experts_Mk = torch.empty(tokens, top_k, dtype=torch.int64)
    weights_Mk = torch.empty(tokens, top_k, dtype=torch.float32)
    logits_ME = torch.empty(tokens, experts, dtype=torch.float32)
    threads.sync()
    _native.kernels(level).router(
        x_MD.data_ptr(),
        DTYPE_CODES[x_MD.dtype],
        x_MD.stride(0),
        tokens,
        weight_ED.data_ptr(),
        DTYPE_CODES[weight_ED.dtype],
        experts,
        x_MD.shape[1],
        correction_bias_E.data_ptr(),
        top_k,
        n_group,
        topk_group,
        norm_topk_prob,
        scaling_factor,
        experts_Mk.data_ptr(),
        weights_Mk.data_ptr(),
        logits_ME.data_ptr(),
    )
    return experts_Mk, weights_Mk, logits_ME
