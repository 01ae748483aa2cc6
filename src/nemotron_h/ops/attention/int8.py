"""Keys and values as int8 with one factor per key head and position.

Letters: B batch · K key/value heads · S positions · d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Int8Rows(NamedTuple):
    """What stands for `bytes_BKSd · scale_BKS`: int8 [B, K, S, d] and float32 [B, K, S]."""

    bytes_BKSd: Tensor
    scale_BKS: Tensor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[B, K, S, d], multiplied in float32 (float64 where `dtype` is) and rounded once to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.bytes_BKSd.to(wide) * self.scale_BKS[..., None].to(wide)).to(dtype)


def quantize(x_BKSd: Tensor) -> Int8Rows:
    """The nearest int8 rows: the factor is the row's largest magnitude / 127. A NaN or infinity makes its row NaN."""
    wide = x_BKSd.float()
    scale_BKS = wide.abs().amax(-1) / 127
    divisor_BKS = torch.where(scale_BKS > 0, scale_BKS, 1)  # a row of zeros
    bytes_BKSd = (wide / divisor_BKS[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Rows(bytes_BKSd, torch.where(scale_BKS < torch.inf, scale_BKS, torch.nan))
