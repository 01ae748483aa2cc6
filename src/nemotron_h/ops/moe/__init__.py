"""Routed experts (numerics.md, "Router and MoE"): `Σ_k w_k · down_e(act(up_e(x)))` for the experts e of each token.

Letters: M tokens · L width in which experts work (latent or hidden size) · F expert width · E experts · k per token.
"""

import torch
from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.linear.native import MOST_ROWS
from nemotron_h.ops.moe import grouped, native, reference
from nemotron_h.quantization import Arithmetic, Packing

_MANY = dispatch.register("moe", reference.experts, grouped.experts, grouped.refusal, fast_name="grouped")
_FEW = dispatch.register("moe_few", reference.experts, native.experts, native.refusal, slack=16.0)
_PACKED = dispatch.register(
    "packed_moe", reference.packed_experts, native.packed_experts, native.packed_refusal, slack=16.0
)


def experts(
    x_ML: Tensor,
    experts_Mk: Tensor,
    weights_Mk: Tensor,
    up_EFL: Tensor,
    down_ELF: Tensor,
    activation: str,
    up_bias_EF: Tensor | None = None,
    down_bias_EL: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, in float32 and in the order of `experts_Mk`. Returns [M, L].

    Args:
        experts_Mk: Expert ids, ascending in each row.
        weights_Mk: Their weights, float32.
        up_EFL, down_ELF: Stacked projections, out x in.
        impl: "reference", "native" (the C++ kernel, up to 8 tokens) or "grouped" (torch._grouped_mm); None takes what
            fits.
    """
    op = _FEW if impl == "native" or (impl is None and len(x_ML) <= MOST_ROWS) else _MANY
    return op(x_ML, experts_Mk, weights_Mk, up_EFL, down_ELF, activation, up_bias_EF, down_bias_EL, impl=impl)


def packed_experts(
    x_ML: Tensor,
    experts_Mk: Tensor,
    weights_Mk: Tensor,
    up: Tensor,
    down: Tensor,
    packing: Packing,
    width: int,
    activation: str,
    up_bias_EF: Tensor | None = None,
    down_bias_EL: Tensor | None = None,
    arithmetic: Arithmetic = "int8",
    *,
    impl: str | None = None,
) -> Tensor:
    """`experts` over packed weights, any number of tokens; an expert is read once for 512 tokens.

    Args:
        up, down: Stacks of E packed matrices, width x L and L x width, uint8 [E, panels, bytes].
        arithmetic: As in `ops.linear.packed_linear`, for the inputs of both projections.
    """
    args = (x_ML, experts_Mk, weights_Mk, up, down, packing, width, activation, up_bias_EF, down_bias_EL, arithmetic)
    return _PACKED(*args, impl=impl)


def load(
    experts_Mk: Tensor, n_experts: int, valid_M: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Tokens per expert [E], in `dtype`; padding does not count."""
    ones = torch.ones_like(experts_Mk, dtype=dtype)
    if valid_M is not None:
        ones = ones * valid_M[:, None]
    counts = torch.zeros(n_experts, dtype=dtype, device=experts_Mk.device)
    return counts.index_add(0, experts_Mk.flatten(), ones.flatten())
