"""Sampling in PyTorch: the specification.

Letters: V vocabulary.
"""

import torch
from torch import Tensor

from nemotron_h.errors import InputError

LEAST_SCALED = -64.0  # a token of e^-64 cannot be reached by a u of 53 bits


def sample(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """See `nemotron_h.ops.sample.sample`."""
    if logits_V.dim() != 1 or logits_V.shape[0] == 0:
        raise InputError(f"sample: logits must be [V] with V >= 1, got {list(logits_V.shape)}.")
    if not bool(logits_V.isfinite().all()):
        return -1
    logits_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
    best = logits_V.max()
    if temperature == 0:
        return int((logits_V == best).nonzero()[0])
    scaled_V = (logits_V - best) / temperature
    scaled_V = scaled_V.masked_fill(~greatest(logits_V, top_k) | (scaled_V < LEAST_SCALED), -torch.inf)
    weight_V = truncate(scaled_V, 0, top_p, min_p).exp()
    sum_V = weight_V.cumsum(0)
    reached = int((sum_V <= u * float(sum_V[-1])).sum())
    return min(reached, int(weight_V.nonzero()[-1]))  # u times the total may be rounded up to the total


def truncate(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Logits with everything outside top_k, top_p and min_p at -inf; the best token always stays."""
    keep_V = greatest(logits_V, top_k)
    if top_p < 1:
        probability_V, order = logits_V.masked_fill(~keep_V, -torch.inf).softmax(-1).sort(descending=True, stable=True)
        wanted = probability_V.cumsum(-1) - probability_V < top_p  # the better tokens alone do not reach it
        wanted[0] = True  # however small top_p is
        keep_V &= torch.zeros_like(keep_V).scatter(0, order, wanted)
    if min_p > 0:
        keep_V &= (logits_V - logits_V.max()).exp() >= min_p
    return logits_V.masked_fill(~keep_V, -torch.inf)


def greatest(logits_V: Tensor, count: int) -> Tensor:
    """[V] bool: the `count` greatest, lower ids first among equals; all of them for 0."""
    if not 0 < count < logits_V.shape[0]:
        return torch.ones_like(logits_V, dtype=torch.bool)
    chosen = logits_V.sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(logits_V, dtype=torch.bool).scatter(0, chosen, True)
