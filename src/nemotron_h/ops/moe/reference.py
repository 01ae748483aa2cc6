"""Routed experts in PyTorch: the specification. Differentiable; any device, any dtype, `meta` included.

Nothing loops over experts or tokens and no shape depends on the routing. Each visit of a token to an expert is a row;
the rows are sorted by expert and cut into blocks of b rows, each block of one expert, so that one batched product over
blocks does it. With b near the mean load there are at most twice as many blocks as experts.

Letters: M tokens · k experts per token · V = M·k visits · n blocks · b rows of a block · L, F widths · E experts.
"""

import torch
from torch import Tensor

from nemotron_h.ops.activations import activation as by_name
from nemotron_h.ops.moe.combine import weighted_sum


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
    (tokens, top_k), n_experts = experts_Mk.shape, up_EFL.shape[0]
    slot_V, expert_n, rows = _blocks(experts_Mk.flatten(), n_experts)
    token_V = torch.arange(tokens * top_k, device=x_ML.device) // top_k
    x_nbL = x_ML.new_zeros(expert_n.shape[0] * rows, x_ML.shape[1]).index_copy(0, slot_V, x_ML[token_V])
    x_nbL = x_nbL.unflatten(0, (-1, rows))

    h_nbF = x_nbL @ up_EFL[expert_n].transpose(1, 2)
    if up_bias_EF is not None:
        h_nbF = h_nbF + up_bias_EF[expert_n, None]
    y_nbL = by_name(activation)(h_nbF) @ down_ELF[expert_n].transpose(1, 2)
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
