"""Packed matrices of every format, with the float32 values that they stand for.

Letters: N rows · K columns · g groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_h.quantization import BF16, INT4, INT8, Packing, grouped, grouped_packing, pack

GROUPED = [
    grouped_packing(bits, group, dtype, has_min)
    for bits in (4, 8)
    for group in (32, 64, 128)
    for dtype in (torch.float16, torch.bfloat16)
    for has_min in (False, True)
]
PACKINGS = [BF16, INT8, INT4, *GROUPED]


class Packed(NamedTuple):
    """A packed matrix, and its values: of grouped formats by the formula, from the integers that went in."""

    panels: Tensor
    packing: Packing
    rows: int
    cols: int


def draw(packing: Packing, rows: int, cols: int, generator: torch.Generator) -> tuple[Packed, Tensor | None]:
    """A random matrix, and the values that it must have (None for our own integers, which round)."""
    if packing.own:
        w_NK = torch.randn(rows, cols, generator=generator)
        w_NK = w_NK.bfloat16().float() if packing.floating else w_NK
        return Packed(pack(w_NK, packing), packing, rows, cols), w_NK.double() if packing.floating else None
    unsigned = packing.has_min and packing.bits == 4
    low, high = (0, 16) if unsigned else (-(2 ** (packing.bits - 1)), 2 ** (packing.bits - 1))
    q_NK = torch.randint(low, high, (rows, cols), generator=generator)
    groups = -(-cols // packing.group)
    scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(packing.scale_dtype)
    minimums = torch.randn(rows, groups, generator=generator) * 0.1 if packing.has_min else None
    panels = grouped.pack(q_NK, scales, packing, minimums)
    per_column = scales.double().repeat_interleave(packing.group, 1)[:, :cols]
    w_NK = q_NK * per_column
    if minimums is not None:
        w_NK = w_NK + minimums.double().repeat_interleave(packing.group, 1)[:, :cols]
    return Packed(panels, packing, rows, cols), w_NK
