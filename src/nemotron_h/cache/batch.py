"""The cache of sequences that decode together: each joins with what it read alone, and leaves when its text ends.

Convolution windows and SSM states of all sequences lie one behind the other in one tensor per layer, as the kernels
read them. Keys and values stay each sequence's own: a long text costs its neighbours neither memory nor time, and its
sums over keys run in the order that they have alone.

Letters: B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from nemotron_h.cache.hybrid import NemotronHHybridDynamicCache
from nemotron_h.cache.layers import AttentionLayer, CacheLayer
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import UnsupportedError


class RowsLayer(CacheLayer):
    """The keys and values of B sequences, each in a layer of its own; `NemotronHAttention` goes through `rows`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[AttentionLayer] = []

    def commit(self, slots: int) -> None:
        for row in self.rows:
            row.commit(slots)

    def join(self, others: Sequence[Any]) -> None:
        self.rows += others

    def replace(self, row: int, other: Any) -> None:
        self.rows[row] = other

    def drop(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        del self.rows[-1]


class BatchCache(NemotronHHybridDynamicCache):
    """What B sequences of different lengths remember; row b of a pass continues sequence b by its tokens.

    It takes what attention, Mamba and stateless blocks keep. Sequences come as caches of one row each, whose tensors
    it takes over or copies: they are not to be used again. `length` is that of the longest.
    """

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config)
        self.layers = [RowsLayer() if isinstance(layer, AttentionLayer) else layer for layer in self.layers]
        self._lengths: list[int] = []

    def join(self, caches: Sequence[NemotronHHybridDynamicCache]) -> None:
        """Further sequences, behind those that are here."""
        for index, layer in enumerate(self.layers):
            layer.join([cache.layers[index] for cache in caches])  # type: ignore[union-attr]
        self._set_lengths([*self._lengths, *(cache.length for cache in caches)])

    def replace(self, row: int, cache: NemotronHHybridDynamicCache) -> None:
        """Another sequence in the place of one that ended."""
        for layer, other in zip(self.layers, cache.layers, strict=True):
            layer.replace(row, other)  # type: ignore[union-attr]
        self._lengths[row] = cache.length
        self._set_lengths(self._lengths)

    def drop(self, row: int) -> None:
        """Forget a sequence; the last one takes its row."""
        for layer in self.layers:
            layer.drop(row)  # type: ignore[union-attr]
        self._lengths[row] = self._lengths[-1]
        self._set_lengths(self._lengths[:-1])

    def commit(self, batch: int, tokens: int, slots_valid_BS: Tensor | None) -> None:
        super().commit(batch, tokens, slots_valid_BS)
        self._set_lengths([length + tokens for length in self._lengths])

    def _set_lengths(self, lengths: list[int]) -> None:
        self._lengths, self._batch = lengths, len(lengths)
        self.length = max(lengths, default=0)

    @property
    def row_lengths(self) -> list[int]:
        return list(self._lengths)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            "the cache of sequences that decode together has only join, replace and drop: use a cache of their own"
        )

    crop = reset = save = _map_batch = _refuse
