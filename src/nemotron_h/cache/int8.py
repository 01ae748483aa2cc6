"""Keys and values kept as int8.

Letters: B batch · T tokens · K key/value heads · d head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nemotron_h.cache.layers import AttentionLayer
from nemotron_h.ops.attention import Int8Rows, quantize


class Int8AttentionLayer(AttentionLayer):
    """Int8 keys and values [B, K, capacity, d] and their float32 factors [B, K, capacity]."""

    names = ("keys", "key_scales", "values", "value_scales")
    key_scales: Any  # None before the first pass
    value_scales: Any

    def append(self, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Int8Rows, Int8Rows]:
        """Round this pass's keys and values, write them behind the committed ones and return all of them."""
        end = self.length + k_BKTd.shape[2]
        for name, new in zip(self.names, (*quantize(k_BKTd), *quantize(v_BKTd)), strict=True):
            setattr(self, name, self._write(getattr(self, name), new, end))
        keys, key_scales, values, value_scales = (getattr(self, name)[:, :, :end] for name in self.names)
        return Int8Rows(keys, key_scales), Int8Rows(values, value_scales)
