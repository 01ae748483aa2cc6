"""What NEMOTRON_H_CHECK=1 asks of a sampling kernel.

A draw has no error that could be measured: where a sum meets its bound within float32's rounding, the next token is as
right. So the token must be one that the reference draws for a u, top_p and min_p that lie as close to the given ones as
rounding may bring them: in float64, or in float32, where tokens may weigh the same that float64 can tell apart. Greedy
choices must be float64's.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from nemotron_h.ops import dispatch
from nemotron_h.ops.sample import reference

ROUNDING = 1e-5
"""Relative error of sums and weights in float32, 131072 tokens included."""


def wrong(args: tuple[Any, ...], token: int) -> str | None:
    """What is wrong with the kernel's token; None when nothing is."""
    exact_V, temperature, top_k, top_p, min_p, u = dispatch.in_float64(args)
    expected = reference.sample(exact_V, temperature, top_k, top_p, min_p, u)
    if token == expected:
        return None
    if token >= 0 and expected >= 0 and temperature > 0:
        factors = (1 - ROUNDING, 1.0, 1 + ROUNDING)
        bounds = _near(top_p, factors), _near(min_p, factors), (u - ROUNDING, u, u + ROUNDING)
        for logits_V, p, least, at in product((exact_V, args[0]), *bounds):
            if token == reference.sample(logits_V, temperature, top_k, p, least, min(max(at, 0.0), 1.0)):
                return None
    return f"chose token {token} where {expected} is right"


def _near(bound: float, factors: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(min(bound * factor, 1.0) for factor in factors) if 0 < bound < 1 else (bound,)
