"""`NemotronHHybridStaticCache`: every tensor allocated once, so that a compiled decoding step is compiled once.

The number of slots in use is a tensor, attention always reads all of them behind a mask, and windows and states are
written over. What it holds is what `NemotronHHybridDynamicCache` holds.

Letters: B batch · T tokens · K key/value heads · N = max_cache_len slots · d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_h.cache.hybrid import NemotronHHybridDynamicCache
from nemotron_h.cache.layers import AttentionLayer
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import CacheError, InputError, UnsupportedError
from nemotron_h.ops.tracing import tracing


class StaticAttentionLayer(AttentionLayer):
    """Keys and values [B, K, N, d]."""

    in_place = True

    def __init__(self, capacity: int, past: Tensor) -> None:
        super().__init__()
        self.capacity, self.past, self.is_used = capacity, past, False

    def append(self, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write this pass's keys and values and return those of all N slots; of the first pass only its own."""
        if self.keys is None or self.values is None:
            shape = (*k_BKTd.shape[:2], self.capacity, k_BKTd.shape[3])
            self.keys, self.values = k_BKTd.new_zeros(shape), v_BKTd.new_zeros(shape)
        own_T = torch.arange(k_BKTd.shape[2], device=k_BKTd.device)
        if self.is_used:
            own_T = own_T + self.past
        self.keys.index_copy_(2, own_T, k_BKTd)
        self.values.index_copy_(2, own_T, v_BKTd)
        return (self.keys, self.values) if self.is_used else (k_BKTd, v_BKTd)

    def commit(self, slots: int) -> None:
        self.is_used = True

    def remember(self) -> Callable[[], None]:
        before = self.is_used  # which slots count is all that changes of those in use

        def put_back() -> None:
            self.is_used = before

        return put_back

    def map_batch(self, change: Any) -> None:
        for name in self.names:
            if getattr(self, name) is not None:
                self.keep(name, change(getattr(self, name)))

    def take_back(self, slots: int, length: int) -> None:
        self.is_used = slots < length

    def reset(self) -> None:
        self.is_used = False  # the tensors stay; nothing reads them

    def tensors(self) -> dict[str, Tensor]:
        length = int(self.past)
        if self.keys is None or self.values is None or length == 0:
            return {}
        return {"keys": self.keys[:, :, :length], "values": self.values[:, :, :length]}


class NemotronHHybridStaticCache(NemotronHHybridDynamicCache):
    """The cache of `generate(cache_implementation="static")`: tensors of constant shape and address, inference only.

    Args:
        config: Decides the layers and the dtype of SSM states.
        max_cache_len: Slots N, padding included.
        batch_size, dtype: Accepted as transformers' StaticCache has them; the first pass decides them.
        device: Where the model runs.

    Raises:
        InputError: `max_cache_len` is not a positive integer.
    """

    def __init__(
        self,
        config: NemotronHConfig,
        max_cache_len: int,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if type(max_cache_len) is not int or max_cache_len < 1:
            raise InputError(f"max_cache_len={max_cache_len!r}: must be a number of tokens, at least 1")
        self.used = torch.zeros((), dtype=torch.long, device=device)
        self.is_used = False
        super().__init__(config)
        self.max_cache_len = max_cache_len
        for index, layer in enumerate(self.layers):
            if isinstance(layer, AttentionLayer):
                self.layers[index] = StaticAttentionLayer(max_cache_len, self.used)
            layer.in_place = True  # type: ignore[union-attr]

    @property
    def length(self) -> int:  # type: ignore[override]
        return int(self.used)

    @length.setter
    def length(self, value: int) -> None:
        self.used.fill_(value)
        self.is_used = value > 0

    @property
    def past(self) -> int | Tensor:
        return self.used if self.is_used else 0

    @property
    def capacity(self) -> int | None:
        return self.max_cache_len

    @property
    def is_compileable(self) -> bool:
        return True

    def begin(self, batch: int, tokens: int) -> None:
        super().begin(batch, tokens)
        if torch.is_grad_enabled():
            raise CacheError(
                "a NemotronHHybridStaticCache writes over what gradients would need: run under torch.no_grad(), or use"
                " NemotronHHybridDynamicCache"
            )
        if not tracing() and self.length + tokens > self.max_cache_len:
            raise CacheError(
                f"the cache has room for max_cache_len={self.max_cache_len} tokens, holds {self.length} and would get"
                f" {tokens} more: make it longer"
            )

    def slots_valid(self, valid_BT: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Validity [B, N]; slots that are not in use yet count as real, no query sees them."""
        if valid_BT is None:
            return self.slots_valid_BS
        known_BN = self.slots_valid_BS
        if known_BN is None:
            known_BN = torch.ones(batch, self.max_cache_len, dtype=torch.bool, device=device)
        return known_BN.index_copy(1, torch.arange(tokens, device=device) + self.past, valid_BT)

    def commit(self, batch: int, tokens: int, slots_valid_BS: Tensor | None) -> None:
        if tokens:
            for layer in self.layers:
                layer.commit(tokens)  # type: ignore[union-attr]
            self.used += tokens
            self.is_used = True
        if slots_valid_BS is not None and self.slots_valid_BS is not None:
            self.slots_valid_BS.copy_(slots_valid_BS)
        else:
            self.slots_valid_BS = slots_valid_BS
        self._batch = batch

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.max_cache_len, 0

    def _forget_slots(self, slots_valid_BS: Tensor) -> None:
        slots_valid_BS[:, self.length :] = True

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NemotronHHybridStaticCache:
        """A saved cache is read into one that grows."""
        raise UnsupportedError(
            "NemotronHHybridDynamicCache.load(path, config) reads a saved cache, this class does not"
        )
