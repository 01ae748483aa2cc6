"""What NEMOTRON_H_CHECK=1 asks of a router kernel.

The logits keep the error budget. The choice is then judged for the kernel's own logits: it must be float64's, except
where a score is as good as tied with one on the other side of the choice; and the weights must be those of these
logits and this choice, within the budget. So neither a near-tie nor the rounding of a logit raises an alarm, and a
wrong choice does.

Letters: M tokens · D hidden size · E experts · g groups · k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.router import reference

SLACK = 4.0
TIE = 1e-5
"""Scores (of experts or groups) are as good as tied when they differ by less, relative to max(1, |score|)."""
LEAST = 1e-15
"""Error of a weight that is always allowed, times the scaling factor: kernels count subnormal scores as zero."""


def wrong(args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """What is wrong with the kernel's result; None when nothing is."""
    x_MD, weight_ED, bias_E, top_k, n_group, topk_group, norm, scaling = args
    experts_Mk, weights_Mk, logits_ME = result
    dtype = logits_ME.dtype
    low, high = (x_MD.to(t) @ weight_ED.to(t).T for t in (dtype, torch.float64))
    error, allowed = dispatch.budget(logits_ME, low, high, SLACK)
    if allowed < error < float("inf"):
        allowed += SLACK * dispatch.sensitivity(lambda x, w: x @ w.T, (x_MD, weight_ED))
    found = dispatch.off(error, allowed)
    if found is not None:
        return f"{found} in its logits"
    score_ME = logits_ME.double().sigmoid() + bias_E.double()
    if bool((experts_Mk.diff(dim=-1) <= 0).any() or (experts_Mk < 0).any() or (experts_Mk >= len(bias_E)).any()):
        return "returned ids that are no ascending choice of experts"
    clear_M = _clear(score_ME, top_k, n_group, topk_group)
    expected_Mk = reference.choose(score_ME, top_k, n_group, topk_group)
    if not torch.equal(experts_Mk[clear_M], expected_Mk[clear_M]):
        return "chose other experts than its logits say"
    low, high = (reference.weigh(t, experts_Mk, norm, scaling) for t in (logits_ME, logits_ME.double()))
    error, allowed = dispatch.budget(weights_Mk, low, high, SLACK)
    found = dispatch.off(error, allowed + LEAST * abs(scaling))
    return f"{found} in its weights" if found is not None else None


def _clear(score_ME: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """[M]: whether neither the choice of groups nor that of experts is as good as tied."""
    clear_M = torch.ones(len(score_ME), dtype=torch.bool)
    if topk_group < n_group:
        group_Mg = reference.group_scores(score_ME, n_group)
        clear_M &= _gap(group_Mg, topk_group) >= TIE
        score_ME = reference.within_groups(score_ME, group_Mg, topk_group)
    return clear_M & (_gap(score_ME, top_k) >= TIE)


def _gap(score_MN: Tensor, count: int) -> Tensor:
    """[M]: from the worst chosen score to the best that was not, relative; NaN where either is NaN."""
    if count == score_MN.shape[1]:
        return torch.full_like(score_MN[:, 0], torch.inf)
    ranked_MN = score_MN.sort(dim=-1, descending=True).values
    inside_M, outside_M = ranked_MN[:, count - 1], ranked_MN[:, count]
    return (inside_M - outside_M) / inside_M.abs().clamp(min=1)
