"""The parts of a cache: what each block type keeps between passes.

Letters: B batch · T tokens · K key/value heads · d head size · C conv channels · W = taps - 1 · H, P, N as in ops/ssd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nemotron_h.ops.causal_conv1d import next_window
from nemotron_h.ops.ssd import ssd

BLOCK = 256  # slots by which the key and value buffers grow
JOURNAL = 64  # tokens that a recording cache can always take back
CHUNK = 128  # tokens of a chunk when some are run again


class CacheLayer(CacheLayerMixin):
    """State of one block. This base keeps none; it serves moe and mlp blocks.

    A layer's tensors have the batch as first dimension and are listed in `names`: that is all that reordering,
    selecting, repeating, saving and loading need. A block type of your own subclasses this (see examples/new_block.py).
    """

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.pending: tuple[Tensor, ...] | None = None
        for name in self.names:
            setattr(self, name, None)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last few slots can be forgotten, as assisted decoding asks: not where a state has no history."""
        return not self.names

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names if getattr(self, name) is not None}

    def update(self, *states: Tensor) -> None:
        """Hand over the states behind this pass, in the order of `names`; they count from `commit` on."""
        self.pending = states

    def commit(self, slots: int) -> None:
        if self.pending is not None:
            for name, state in zip(self.names, self.pending, strict=True):
                setattr(self, name, state)
            self.pending = None

    def map_batch(self, change: Any) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, change(tensor))

    def reset(self) -> None:
        self.pending = None
        for name in self.names:
            setattr(self, name, None)

    def can_take_back(self, slots: int, length: int) -> bool:
        """Whether the last `slots` of `length` slots can be forgotten: all or none of them where no history is kept."""
        return slots == 0 or slots >= length or not self.tensors()

    def take_back(self, slots: int, length: int) -> None:
        """Forget the last `slots` of `length` slots; called only when `can_take_back`."""
        if slots >= length:
            self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class AttentionLayer(CacheLayer):
    """Keys and values [B, K, capacity, d]; the buffers grow by `BLOCK` slots and `length` of them are in use."""

    names = ("keys", "values")

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    @property
    def is_croppable(self) -> bool:
        return True

    def append(self, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write this pass's keys and values behind the committed ones and return all of them."""
        end = self.length + k_BKTd.shape[2]
        self.keys = self._write(self.keys, k_BKTd, end)
        self.values = self._write(self.values, v_BKTd, end)
        if self.length == 0:
            return k_BKTd, v_BKTd
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _write(self, buffer: Tensor | None, new_BKTd: Tensor, end: int) -> Tensor:
        used = None if buffer is None or self.length == 0 else buffer[:, :, : self.length]
        if torch.is_grad_enabled():  # a graph may hold what was here, even where only the queries are trained
            return new_BKTd if used is None else torch.cat([used, new_BKTd], dim=2)
        if used is None or buffer is None or buffer.shape[2] < end:
            batch, heads, _, size = new_BKTd.shape
            buffer = new_BKTd.new_zeros(batch, heads, -(-end // BLOCK) * BLOCK, size)
            if used is not None:
                buffer[:, :, : self.length] = used
        buffer[:, :, self.length : end] = new_BKTd
        return buffer

    def commit(self, slots: int) -> None:
        if self.keys is not None:
            self.length += slots

    def tensors(self) -> dict[str, Tensor]:
        if self.keys is None or self.values is None or self.length == 0:
            return {}
        return {"keys": self.keys[:, :, : self.length], "values": self.values[:, :, : self.length]}

    def can_take_back(self, slots: int, length: int) -> bool:
        return True

    def take_back(self, slots: int, length: int) -> None:
        self.length = max(0, self.length - slots)

    def reset(self) -> None:
        super().reset()
        self.length = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length


class Step(NamedTuple):
    """What one pass fed to a Mamba layer: enough to run a prefix of it again. Rows are compacted (Layout.compact)."""

    window_BCW: Tensor | None
    state_BHPN: Tensor | None
    xBC_BTC: Tensor
    x_BTHP: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    B_BTGN: Tensor
    valid_BT: Tensor | None  # of the pass's slots, not compacted

    def map_batch(self, change: Any) -> Step:
        batched = {name: change(t) for name, t in self._asdict().items() if t is not None and name != "A_H"}
        return self._replace(**batched)


class MambaLayer(CacheLayer):
    """Last W inputs of the convolution [B, C, W] and the SSM state [B, H, P, N].

    A recording layer also keeps a journal of the passes since the last `crop`, so that tokens can be taken back by
    running the kept ones of that pass again from the state before it.
    """

    names = ("conv_states", "recurrent_states")

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.state_dtype = dtype
        self.record_past = False
        self.journal: list[Step] = []
        self._pending_step: Step | None = None

    @property
    def is_croppable(self) -> bool:
        return self.record_past or self.recurrent_states is None

    def activate_past_recording(self) -> None:
        self.record_past = True

    def at_rest(self, state_BHPN: Tensor) -> Tensor:
        """The state in `mamba_ssm_cache_dtype`; a float64 model keeps float64."""
        wide = state_BHPN.dtype == torch.float64 and self.state_dtype == torch.float32
        return state_BHPN if wide else state_BHPN.to(self.state_dtype)

    def record(self, step: Step) -> None:
        if self.record_past:
            self._pending_step = step

    def commit(self, slots: int) -> None:
        super().commit(slots)
        if self._pending_step is not None:
            self.journal.append(self._pending_step)
            self._pending_step = None
        while len(self.journal) > 1 and sum(s.dt_BTH.shape[1] for s in self.journal[1:]) >= JOURNAL:
            del self.journal[0]

    def map_batch(self, change: Any) -> None:
        super().map_batch(change)
        self.journal = [step.map_batch(change) for step in self.journal]

    def reset(self) -> None:
        super().reset()
        self.journal, self._pending_step = [], None

    def take_back(self, slots: int, length: int) -> None:
        if slots >= length:
            self.reset()
        elif self.recurrent_states is not None and slots > 0:
            self._replay(slots)
        self.journal.clear()

    def can_take_back(self, slots: int, length: int) -> bool:
        recorded = sum(step.dt_BTH.shape[1] for step in self.journal)
        return slots == 0 or slots >= length or self.recurrent_states is None or slots <= recorded

    def _replay(self, slots: int) -> None:
        step = self.journal.pop()
        while slots > step.dt_BTH.shape[1]:
            slots -= step.dt_BTH.shape[1]
            step = self.journal.pop()
        kept = step.dt_BTH.shape[1] - slots
        if step.valid_BT is None:
            lengths_B = torch.full((step.dt_BTH.shape[0],), kept, device=step.dt_BTH.device)
        else:
            lengths_B = step.valid_BT[:, :kept].sum(-1)
        self.conv_states = next_window(step.xBC_BTC, step.window_BCW, self.conv_states.shape[2], lengths_B)
        if kept == 0:
            zero = torch.zeros_like(self.recurrent_states)
            self.recurrent_states = zero if step.state_BHPN is None else step.state_BHPN
            return
        real_BT = torch.arange(kept, device=lengths_B.device) < lengths_B[:, None]
        dt_BTH = torch.where(real_BT[..., None], step.dt_BTH[:, :kept], 0)
        D_H, C_BTGN = torch.zeros_like(step.A_H), torch.zeros_like(step.B_BTGN[:, :kept])
        replayed = ssd(
            step.x_BTHP[:, :kept], dt_BTH, step.A_H, step.B_BTGN[:, :kept], C_BTGN, D_H, CHUNK, step.state_BHPN
        )
        self.recurrent_states = self.at_rest(replayed.final_state)


LAYERS: dict[str, Any] = {
    "mamba": lambda config: MambaLayer(getattr(torch, config.mamba_ssm_cache_dtype)),
    "attention": lambda config: AttentionLayer(),
}
"""Block type to cache layer; block types that are not listed keep no state."""
