"""Losses: next-token cross-entropy, MTP, and the router's balance and z-losses (numerics.md, "Losses").

Letters: B batch · T tokens · V vocabulary · M = B·T rows · E experts · k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.errors import InputError
from nemotron_h.layout import Layout, readable
from nemotron_h.ops.router import Routing

IGNORE = -100


def check_labels(labels_BT: Tensor, batch: int, tokens: int, vocab_size: int) -> None:
    """Raise `InputError` unless labels are [B, T] token ids or -100."""
    if labels_BT.shape != (batch, tokens):
        raise InputError(f"labels must be [batch, tokens] = [{batch}, {tokens}], got {list(labels_BT.shape)}")
    if readable(labels_BT) and bool(((labels_BT != IGNORE) & ((labels_BT < 0) | (labels_BT >= vocab_size))).any()):
        raise InputError(f"labels must be token ids below vocab_size={vocab_size}, or -100 to be ignored")


def targets(labels_BT: Tensor, layout: Layout, ahead: int) -> Tensor:
    """Label of the real token `ahead` of each, [B, T - ahead]; ignored at padding, at a row's end and where it lies in
    another document."""
    shifted = layout.compact(labels_BT)[:, ahead:]
    tokens = shifted.shape[1]
    seq_idx_BT, valid_BT = layout.compact_seq_idx_BT(), layout.compact_valid_BT()
    if seq_idx_BT is not None:
        shifted = shifted.masked_fill(seq_idx_BT[:, ahead:] != seq_idx_BT[:, :tokens], IGNORE)
    if valid_BT is None or layout.valid_BT is None:
        return shifted
    expanded = layout.expand(shifted.masked_fill(~valid_BT[:, ahead:], IGNORE))
    return expanded.masked_fill(~layout.valid_BT[:, :tokens], IGNORE)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean over targets that are not ignored, or their sum over `num_items` (gradient accumulation)."""
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction=reduction)
    return loss if num_items is None else loss / num_items


def next_token(logits_BTV: Tensor, labels_BT: Tensor, layout: Layout, num_items: Tensor | int | None) -> Tensor:
    """Cross-entropy of each token's successor."""
    return cross_entropy(logits_BTV[:, :-1], targets(labels_BT, layout, 1), num_items)


def mtp(mtp_logits: list[Tensor], labels_BT: Tensor, layout: Layout, num_items: Tensor | int | None) -> Tensor:
    """Mean over depths; depth j [B, T - j, V] predicts the token j + 1 ahead; without targets it counts as zero."""
    total = mtp_logits[0].new_zeros(())
    for depth, logits_BTV in enumerate(mtp_logits, start=1):
        wanted = targets(labels_BT, layout, depth + 1)
        counted = (wanted != IGNORE).sum().clamp(min=1) if num_items is None else num_items
        total = total + cross_entropy(logits_BTV[:, : wanted.shape[1]], wanted, counted)
    return total / len(mtp_logits)


def balance(routings: Sequence[Routing], layout: Layout, batch: int) -> Tensor:
    """Sequence-level balance loss: `E/k · Σ_e (share of visits to e)·(mean of s_e / Σ s)`; mean of rows, sum of layers.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20; Megatron's `seq_aux_loss`.
    """
    weight_BT1 = None if layout.valid_BT is None else layout.valid_BT[..., None].to(routings[0].logits.dtype)
    layers = []
    for experts_Mk, _, logits_ME in routings:
        n_experts, top_k = logits_ME.shape[1], experts_Mk.shape[1]
        visits_ME = torch.zeros_like(logits_ME).scatter(1, experts_Mk, 1.0)
        score_ME = logits_ME.sigmoid()
        share_ME = score_ME / (score_ME.sum(-1, keepdim=True) + 1e-20)
        share_BE, visits_BE = (_mean(t.unflatten(0, (batch, -1)), weight_BT1) for t in (share_ME, visits_ME))
        layers.append((visits_BE * share_BE).sum(-1).mean() * (n_experts / top_k))
    return torch.stack(layers).sum()


def z_loss(routings: Sequence[Routing], layout: Layout, batch: int) -> Tensor:
    """`mean(logsumexp(logits)²)` over real tokens, summed over layers (ST-MoE, arXiv 2202.08906, equation 5)."""
    weight_BT1 = None if layout.valid_BT is None else layout.valid_BT[..., None].to(routings[0].logits.dtype)
    terms = [_mean(z.logsumexp(-1).square().unflatten(0, (batch, -1))[..., None], weight_BT1) for _, _, z in routings]
    return torch.stack([term.mean() for term in terms]).sum()


def _mean(x_BTE: Tensor, weight_BT1: Tensor | None) -> Tensor:
    """Mean over the real tokens of each row, [B, E]."""
    if weight_BT1 is None:
        return x_BTE.mean(1)
    return (x_BTE * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
