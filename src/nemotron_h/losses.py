"""Losses: next-token cross-entropy, MTP, and the router's balance and z-losses (numerics.md, "Losses").

Letters: B batch · T tokens · S documents of a row · V vocabulary · M = B·T · E experts · k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.errors import InputError
from nemotron_h.layout import Layout, Recorder, ordered, readable
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


class Weights(NamedTuple):
    """How much each document of each row counts in the router losses, [B, S]; and its tokens' numbers, compacted [B, T]
    (None: a row is one document)."""

    weight_BS: Tensor
    document_BT: Tensor | None


def document_weights(labels_BT: Tensor, layout: Layout, num_items: Tensor | int | None, dtype: torch.dtype) -> Weights:
    """Documents count equally; given `num_items`, by their shares of them, so that micro-batches add up to a batch."""
    valid_BT, document_BT = layout.compact_valid_BT(), layout.compact_seq_idx_BT()
    if document_BT is not None:
        document_BT = F.pad(document_BT.diff(dim=-1) != 0, (1, 0)).long().cumsum(-1)
    real_BT1 = (torch.ones_like(labels_BT) if valid_BT is None else valid_BT)[..., None].to(dtype)
    if num_items is None:
        occupied_BS = _per_document(real_BT1, document_BT)[..., 0].clamp(max=1)
        return Weights(occupied_BS / occupied_BS.sum().clamp(min=1), document_BT)
    wanted_BT = layout.compact(F.pad(targets(labels_BT, layout, 1), (0, 1), value=IGNORE)) != IGNORE
    return Weights(_per_document(wanted_BT[..., None].to(dtype), document_BT)[..., 0] / num_items, document_BT)


def balance(routings: Sequence[Routing], layout: Layout, weights: Weights, ahead: int = 0) -> Tensor:
    """Balance loss `E/k · Σ_e (share of visits to e)·(mean of s_e / Σ s)` of documents; their weighted sum, summed over
    layers.

    Args:
        ahead: Depth of the MTP head that the layers belong to; 0 is the trunk.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20; Megatron's `seq_aux_loss`.
    """
    layers = []
    for experts_Mk, _, logits_ME in routings:
        n_experts, top_k = logits_ME.shape[1], experts_Mk.shape[1]
        visits_ME = torch.zeros_like(logits_ME).scatter(1, experts_Mk, 1.0)
        score_ME = logits_ME.sigmoid()
        share_ME = score_ME / (score_ME.sum(-1, keepdim=True) + 1e-20)
        share_BSE, visits_BSE = (_means(t, layout, weights, ahead) for t in (share_ME, visits_ME))
        layers.append(((visits_BSE * share_BSE).sum(-1) * weights.weight_BS).sum() * (n_experts / top_k))
    return torch.stack(layers).sum()


def z_loss(routings: Sequence[Routing], layout: Layout, weights: Weights, ahead: int = 0) -> Tensor:
    """`mean(logsumexp(logits)²)` of documents, their weighted sum, summed over layers; arguments as `balance`.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    terms = [_means(z.logsumexp(-1, keepdim=True).square(), layout, weights, ahead)[..., 0] for _, _, z in routings]
    return torch.stack([(term_BS * weights.weight_BS).sum() for term_BS in terms]).sum()


def router_terms(
    recorder: Recorder, labels_BT: Tensor, layout: Layout, num_items: Tensor | int | None, mtp_depths: int
) -> dict[str, Tensor]:
    """`aux_loss` and `z_loss` of the trunk's routers and, where the MTP loss is trained, the heads' at its depths."""
    passes = {0: recorder.routings or {}} | (recorder.mtp_routings or {})
    seen = {ahead: ordered(found) for ahead, found in passes.items() if found and ahead <= mtp_depths}
    if not seen:
        return {}
    dtype = next(routings[0].logits.dtype for routings in seen.values() if routings)
    weights = document_weights(labels_BT, layout, num_items, dtype)
    terms = {"aux_loss": balance, "z_loss": z_loss}
    return {
        name: torch.stack([term(routings or (), layout, weights, ahead) for ahead, routings in seen.items()]).sum()
        for name, term in terms.items()
    }


def _means(x_ME: Tensor, layout: Layout, weights: Weights, ahead: int) -> Tensor:
    """Mean over the real tokens of each document, [B, S, E]; at depth `ahead` over those that have such a successor."""
    x_BTE = x_ME.unflatten(0, (weights.weight_BS.shape[0], -1))
    if not ahead:
        x_BTE = layout.compact(x_BTE)
    tokens, document_BT, valid_BT = x_BTE.shape[1], weights.document_BT, layout.compact_valid_BT()
    counted_BT = x_BTE.new_ones(x_BTE.shape[:2]) if valid_BT is None else valid_BT[:, ahead:].to(x_BTE.dtype)
    if document_BT is not None:
        counted_BT = counted_BT * (document_BT[:, ahead:] == document_BT[:, :tokens])
        document_BT = document_BT[:, :tokens]
    slots = weights.weight_BS.shape[1]
    total_BSE = _per_document(x_BTE * counted_BT[..., None], document_BT, slots)
    return total_BSE / _per_document(counted_BT[..., None], document_BT, slots).clamp(min=1)


def _per_document(x_BTE: Tensor, document_BT: Tensor | None, slots: int | None = None) -> Tensor:
    """Sum over the tokens of each document, [B, S, E]; S is 1, or where rows are packed their number of tokens."""
    if document_BT is None:
        return x_BTE.sum(1, keepdim=True)
    sums_BSE = x_BTE.new_zeros(x_BTE.shape[0], slots or x_BTE.shape[1], x_BTE.shape[2])
    return sums_BSE.scatter_add(1, document_BT[..., None].expand_as(x_BTE), x_BTE)
