"""From a row of logits to a token: penalties, bias, and the random numbers that ops.sample draws with.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_h.generation.params import SamplingParams
from nemotron_h.ops.sample import sample

RANDOM_BITS = 53  # of a float's mantissa


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
        """The next token for float32 logits on the CPU; -1 when one of them is NaN or infinite."""
        params = self.params
        u = self._uniform() if params.temperature > 0 else 0.0
        token = sample(self._adjust(logits_V), params.temperature, params.top_k, params.top_p, params.min_p, u)
        if token >= 0:
            self.said.append(token)
        return token

    def _uniform(self) -> float:
        """A uniform random number in [0, 1)."""
        return int(torch.randint(1 << RANDOM_BITS, (), generator=self.generator)) * 2.0**-RANDOM_BITS

    def _adjust(self, logits_V: Tensor) -> Tensor:
        """The logits with bias and penalties; where one is not finite, as they are."""
        params = self.params
        penalties = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        if not (penalties or params.logit_bias) or not bool(logits_V.isfinite().all()):
            return logits_V
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


def top_logprobs(logprobs_V: Tensor, token: int, count: int) -> dict[int, float]:
    """The `count` best tokens' log-probabilities and the actual token's, unrounded, best first."""
    best = logprobs_V.topk(min(count, logprobs_V.shape[0]))
    result = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    result.setdefault(token, float(logprobs_V[token]))
    return result
