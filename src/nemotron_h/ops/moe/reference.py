"""Routed experts in PyTorch: the specification. Differentiable; any device, any dtype, `meta` included.

Nothing loops over experts or tokens and no shape depends on the routing. Each visit of a token to an expert is a row;
the rows are sorted by expert and cut into blocks of b rows, each block of one expert, so that one batched product over
blocks does it. With b near the mean load there are at most twice as many blocks as experts.

Letters: M tokens · k experts per token · V = M·k visits · n blocks · b rows of a block · L, F widths · E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.ops.activations import activation as by_name
from nemotron_h.ops.linear.reference import seen
from nemotron_h.ops.moe.combine import weighted_sum
from nemotron_h.ops.tracing import tracing
from nemotron_h.quantization import Packing, unpack


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
    """See `nemotron_h.ops.moe.experts`."""
    act = by_name(activation)
    return _all_at_once(x_ML, experts_Mk, weights_Mk, up_EFL, down_ELF, act, up_bias_EF, down_bias_EL)


def packed_experts(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up: Tensor, down: Tensor, packing: Packing, width: int,
    activation: str, up_bias_EF: Tensor | None, down_bias_EL: Tensor | None, arithmetic: str,
) -> Tensor:  # fmt: skip
    """See `nemotron_h.ops.moe.packed_experts`. Unpacks one chosen expert after the other, all of them while tracing."""
    if up.is_meta:
        return torch.empty_like(x_ML)
    dtype, latent, act = torch.promote_types(x_ML.dtype, torch.float32), x_ML.shape[1], by_name(activation)
    met = seen(packing, arithmetic)
    wide_ML, biases = met(x_ML.to(dtype)), [None if b is None else b.to(dtype) for b in (up_bias_EF, down_bias_EL)]
    if tracing():
        up_EFL = unpack(up, packing, width, latent).to(dtype)
        down_ELF = unpack(down, packing, latent, width).to(dtype)
        y_ML = _all_at_once(
            wide_ML, experts_Mk, weights_Mk, up_EFL, down_ELF, lambda h: met(act(h)), biases[0], biases[1]
        )
        return y_ML.to(x_ML.dtype)
    y_MkL = wide_ML.new_zeros(*experts_Mk.shape, latent)
    for e in experts_Mk.unique().tolist():
        at = (experts_Mk == e).nonzero(as_tuple=True)
        up_bias_F, down_bias_L = (None if b is None else b[e] for b in biases)
        h_VF = F.linear(wide_ML[at[0]], unpack(up[e], packing, width, latent).to(dtype), up_bias_F)
        y_VL = F.linear(met(act(h_VF)), unpack(down[e], packing, latent, width).to(dtype), down_bias_L)
        y_MkL = y_MkL.index_put(at, y_VL)
    return weighted_sum(y_MkL.flatten(0, 1), weights_Mk).to(x_ML.dtype)


def _all_at_once(
    x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor, up_EFL: Tensor, down_ELF: Tensor,
    act: Callable[[Tensor], Tensor], up_bias_EF: Tensor | None, down_bias_EL: Tensor | None,
) -> Tensor:  # fmt: skip
    (tokens, top_k), n_experts = experts_Mk.shape, up_EFL.shape[0]
    slot_V, expert_n, rows = _blocks(experts_Mk.flatten(), n_experts)
    token_V = torch.arange(tokens * top_k, device=x_ML.device) // top_k
    x_nbL = x_ML.new_zeros(expert_n.shape[0] * rows, x_ML.shape[1]).index_copy(0, slot_V, x_ML[token_V])
    x_nbL = x_nbL.unflatten(0, (-1, rows))

    h_nbF = x_nbL @ up_EFL[expert_n].transpose(1, 2)
    if up_bias_EF is not None:
        h_nbF = h_nbF + up_bias_EF[expert_n, None]
    y_nbL = act(h_nbF) @ down_ELF[expert_n].transpose(1, 2)
    if down_bias_EL is not None:
        y_nbL = y_nbL + down_bias_EL[expert_n, None]
    return weighted_sum(y_nbL.flatten(0, 1)[slot_V], weights_Mk).to(x_ML.dtype)


def _blocks(expert_V: Tensor, n_experts: int) -> tuple[Tensor, Tensor, int]:
    """Where each visit goes (row of the blocks), which expert each block belongs to, and the rows of a block."""
    visits = expert_V.shape[0]
    rows = max(1, -(-visits // n_experts))
    n_blocks = min(visits, visits // rows + n_experts)
    order_V = expert_V.argsort(stable=True)
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=expert_V.device)
    counts_E = counts_E.index_add(0, expert_V, torch.ones_like(expert_V))
    blocks_E = (counts_E + rows - 1) // rows
    first_block_E = blocks_E.cumsum(0) - blocks_E
    first_visit_E = counts_E.cumsum(0) - counts_E
    sorted_V = expert_V[order_V]
    slot_sorted = (
        first_block_E[sorted_V] * rows + torch.arange(visits, device=expert_V.device) - first_visit_E[sorted_V]
    )
    slot_V = torch.zeros_like(slot_sorted).index_copy(0, order_V, slot_sorted)
    block = torch.arange(n_blocks, device=expert_V.device)
    expert_n = torch.searchsorted(blocks_E.cumsum(0), block, right=True).clamp(max=n_experts - 1)
    return slot_V, expert_n, rows
