"""The router in PyTorch: the specification. Differentiable in the weights; any device, `meta` included.

Letters: M tokens · D hidden size · E experts · g groups · k experts per token.
"""

import torch
from torch import Tensor

from nemotron_h.errors import InputError


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
    _check_sizes(weight_ED.shape[0], top_k, n_group, topk_group)
    dtype = torch.promote_types(x_MD.dtype, torch.float32)
    logits_ME = x_MD.to(dtype) @ weight_ED.to(dtype).T
    experts_Mk = choose(logits_ME.detach().sigmoid() + correction_bias_E.to(dtype), top_k, n_group, topk_group)
    return experts_Mk, weigh(logits_ME, experts_Mk, norm_topk_prob, scaling_factor), logits_ME


def choose(score_ME: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """Ids of the k best experts within the best groups, ascending so that sums over experts have one order."""
    if topk_group < n_group:
        score_ME = within_groups(score_ME, group_scores(score_ME, n_group), topk_group)
    return best(score_ME, top_k).sort(-1).values


def group_scores(score_ME: Tensor, n_group: int) -> Tensor:
    """[M, g]: the sum of each group's two best."""
    score_MgE = score_ME.unflatten(1, (n_group, -1))
    return score_MgE.topk(min(2, score_MgE.shape[-1]), dim=-1).values.sum(-1)


def within_groups(score_ME: Tensor, group_Mg: Tensor, topk_group: int) -> Tensor:
    """The scores, -inf outside the best groups."""
    allowed_Mg = torch.zeros_like(group_Mg, dtype=torch.bool).scatter(1, best(group_Mg, topk_group), True)
    return score_ME.unflatten(1, (group_Mg.shape[1], -1)).masked_fill(~allowed_Mg[..., None], -torch.inf).flatten(1)


def best(score_MN: Tensor, count: int) -> Tensor:
    """Ids of the `count` greatest, lower ids first among equals, which `topk` does not promise."""
    return score_MN.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def weigh(logits_ME: Tensor, experts_Mk: Tensor, norm_topk_prob: bool, scaling_factor: float) -> Tensor:
    """The chosen experts' weights [M, k]."""
    weights_Mk = logits_ME.sigmoid().gather(1, experts_Mk)
    if norm_topk_prob:
        weights_Mk = weights_Mk / (weights_Mk.sum(-1, keepdim=True) + 1e-20)
    return weights_Mk * scaling_factor


def _check_sizes(experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    if not 1 <= top_k <= experts:
        raise InputError(f"router: top_k={top_k} must be from 1 to {experts}, the number of experts.")
    if n_group < 1 or experts % n_group or not 1 <= topk_group <= n_group:
        raise InputError(
            f"router: topk_group={topk_group} of n_group={n_group}: n_group must divide {experts} experts, and "
            f"topk_group be from 1 to n_group."
        )
