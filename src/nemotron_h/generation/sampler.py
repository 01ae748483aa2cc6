"""From a row of logits to a token: penalties, bias, temperature, truncation, draw.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_h.generation.params import SamplingParams

LOWEST_TEMPERATURE = 1e-30  # float32 would round a smaller one to zero; below 1e-6 it makes no difference anyway


class Sampler:
    """Chooses the tokens of one text; keeps its random state and the counts of what was said."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], sample: int = 0) -> None:
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed + sample)
        self.said = list(prompt)
        self.prompt_length = len(self.said)

    def choose(self, logits_V: Tensor) -> int:
        """The next token for float32 logits on the CPU; the caller has checked that they are finite."""
        params = self.params
        logits_V = self._adjust(logits_V)
        if params.temperature == 0:
            token = int(logits_V.argmax())
        else:
            scaled_V = (logits_V - logits_V.max()) / max(params.temperature, LOWEST_TEMPERATURE)  # no overflow
            kept_V = truncate(scaled_V, params.top_k, params.top_p, params.min_p)
            token = int(torch.multinomial(kept_V.softmax(-1), 1, generator=self.generator))
        self.said.append(token)
        return token

    def _adjust(self, logits_V: Tensor) -> Tensor:
        params = self.params
        logits_V = logits_V.clone()
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(self.said)), dtype=torch.long)
            score = logits_V[seen]
            factor = params.repetition_penalty
            logits_V[seen] = torch.where(score > 0, score / factor, score * factor)
        if params.presence_penalty or params.frequency_penalty:
            text = torch.tensor(self.said[self.prompt_length :], dtype=torch.long)
            counts_V = torch.bincount(text, minlength=logits_V.shape[0]).to(logits_V.dtype)
            logits_V -= params.presence_penalty * (counts_V > 0) + params.frequency_penalty * counts_V
        for token, bias in (params.logit_bias or {}).items():
            logits_V[token] += bias
        limits = torch.finfo(logits_V.dtype)
        return logits_V.clamp(limits.min, limits.max)  # a penalty may have led an extreme one to infinity


def truncate(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Logits with everything outside top_k, top_p and min_p at -inf; the best token always stays."""
    keep_V = torch.ones_like(logits_V, dtype=torch.bool)
    if 0 < top_k < logits_V.shape[0]:
        chosen = logits_V.topk(top_k).indices
        keep_V &= torch.zeros_like(keep_V).scatter(0, chosen, True)
    if top_p < 1:
        probability, order = logits_V.masked_fill(~keep_V, -torch.inf).softmax(-1).sort(descending=True, stable=True)
        wanted = probability.cumsum(-1) - probability < top_p  # the better tokens alone do not reach it
        wanted[0] = True  # however small top_p is
        keep_V &= torch.zeros_like(keep_V).scatter(0, order, wanted)
    if min_p > 0:
        keep_V &= logits_V.softmax(-1) >= min_p * logits_V.softmax(-1).max()
    return logits_V.masked_fill(~keep_V, -torch.inf)


def top_logprobs(logprobs_V: Tensor, token: int, count: int) -> dict[int, float]:
    """The `count` best tokens' log-probabilities and the actual token's, unrounded, best first."""
    best = logprobs_V.topk(min(count, logprobs_V.shape[0]))
    result = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    result.setdefault(token, float(logprobs_V[token]))
    return result
