"""The router in PyTorch: the specification. Differentiable in the weights; any device, `meta` included.

Letters: M tokens · D hidden size · E experts · g groups · k experts per token.
"""

import torch
from torch import Tensor


def route(
    x_MD: Tensor,
    weight_ED: Tensor,
    correction_bias_E: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nemotron_h.ops.router.route`."""
    dtype = torch.promote_types(x_MD.dtype, torch.float32)
    logits_ME = x_MD.to(dtype) @ weight_ED.to(dtype).T
    score_ME = logits_ME.sigmoid()
    experts_Mk = _choose(score_ME.detach() + correction_bias_E.to(dtype), top_k, n_group, topk_group)
    weights_Mk = score_ME.gather(1, experts_Mk)
    if norm_topk_prob:
        weights_Mk = weights_Mk / (weights_Mk.sum(-1, keepdim=True) + 1e-20)
    return experts_Mk, weights_Mk * scaling_factor, logits_ME


def _choose(selection_ME: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """Ids of the k best experts within the best groups, ascending so that sums over experts have one order."""
    if topk_group < n_group:
        grouped_MgE = selection_ME.unflatten(1, (n_group, -1))
        best_Mg = grouped_MgE.topk(min(2, grouped_MgE.shape[-1]), dim=-1).values.sum(-1)
        groups = best_Mg.topk(topk_group, dim=-1).indices
        allowed_Mg = torch.zeros_like(best_Mg, dtype=torch.bool).scatter(1, groups, True)
        selection_ME = grouped_MgE.masked_fill(~allowed_Mg[..., None], -torch.inf).flatten(1)
    return selection_ME.topk(top_k, dim=-1).indices.sort(-1).values
