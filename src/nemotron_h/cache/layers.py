"""The parts of a cache: what each block type keeps between passes.

Letters: B batch · T tokens · K key/value heads · d head size · C conv channels · W = taps - 1 · H, P, N as in ops/ssd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nemotron_h.cache.journal import JOURNAL, Journal, Step
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.layout import Layout
from nemotron_h.ops.attention import Int8Rows
from nemotron_h.ops.causal_conv1d import next_window
from nemotron_h.ops.slots import with_room
from nemotron_h.ops.ssd import STEP_TOKENS
from nemotron_h.ops.tracing import tracing

BLOCK = 256  # slots by which the key and value buffers grow


class CacheLayer(CacheLayerMixin):
    """State of one block. This base keeps none; it serves moe and mlp blocks.

    A layer's tensors have the batch as first dimension and are listed in `names`: that is all that reordering,
    selecting, repeating, saving and loading need. A block type of your own subclasses this (see examples/new_block.py).
    """

    names: tuple[str, ...] = ()
    in_place = False  # of a cache of fixed shapes: a tensor keeps its address from pass to pass

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
                self.keep(name, state)
            self.pending = None

    def keep(self, name: str, state: Tensor) -> None:
        """Make `state` the tensor `name`, written over the old one where addresses must stay."""
        old = getattr(self, name)
        if self.in_place and old is not None and old.shape == state.shape:
            old.copy_(state)
        else:
            setattr(self, name, state)

    def remember(self) -> Callable[[], None]:
        """A function that makes the layer what it is now, whatever passes and commits come in between."""
        before = dict(vars(self))
        rewritten = {name: tensor.clone() for name, tensor in self.tensors().items()} if self.in_place else {}

        def put_back() -> None:
            vars(self).clear()
            vars(self).update(before)
            for name, tensor in rewritten.items():
                getattr(self, name).copy_(tensor)

        return put_back

    def map_batch(self, change: Any) -> None:
        for name, tensor in self.tensors().items():
            self.keep(name, change(tensor))

    def join(self, others: Sequence[Any]) -> None:
        """Take in the rows of other layers, which are used up, behind the own ones."""
        for name in self.names:
            tensors = [getattr(layer, name) for layer in (self, *others)]
            setattr(self, name, torch.cat([tensor for tensor in tensors if tensor is not None]))
            for other in others:
                setattr(other, name, None)

    def replace(self, row: int, other: Any) -> None:
        """The only row of another layer in the place of row `row`."""
        for name in self.names:
            getattr(self, name)[row].copy_(getattr(other, name)[0])

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place, so that the others need not move."""
        for name in self.names:
            rows = getattr(self, name)
            if row < len(rows) - 1:
                rows[row].copy_(rows[-1])
            setattr(self, name, rows[:-1])

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
        self.expected = 0  # slots for which a new buffer has room at least

    @property
    def is_croppable(self) -> bool:
        return True

    def append(self, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor | Int8Rows, Tensor | Int8Rows]:
        """Write this pass's keys and values behind the committed ones and return all of them."""
        end = self.length + k_BKTd.shape[2]
        self.keys = self._write(self.keys, k_BKTd, end)
        self.values = self._write(self.values, v_BKTd, end)
        if self.length == 0:
            return k_BKTd, v_BKTd
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _write(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        """The buffer [B, K, capacity, ...] with `new` [B, K, T, ...] behind the slots in use."""
        is_new = buffer is None or self.length == 0
        if torch.is_grad_enabled():  # a graph may hold what was here, even where only the queries are trained
            return new if buffer is None or is_new else torch.cat([buffer[:, :, : self.length], new], dim=2)
        room = -(-max(end, self.expected) // BLOCK) * BLOCK
        if buffer is None or is_new:  # what nobody uses may have another number of rows
            return with_room(new, room)
        if buffer.shape[2] < end:
            buffer = with_room(buffer[:, :, : self.length], room)
        buffer[:, :, self.length : end] = new
        return buffer

    def commit(self, slots: int) -> None:
        if self.keys is not None:
            self.length += slots

    def tensors(self) -> dict[str, Tensor]:
        if self.keys is None or self.values is None or self.length == 0:
            return {}
        return {name: getattr(self, name)[:, :, : self.length] for name in self.names}

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


class MambaLayer(CacheLayer):
    """Last W inputs of the convolution [B, C, W] and the SSM state [B, H, P, N].

    A recording layer also keeps a journal of the passes since the last `crop`, so that tokens can be taken back.

    While it decodes, the layer owns two buffers: a step reads the state from one and writes the next into the other,
    which `commit` makes the state. So a step that fails leaves the state as it was, and none allocates memory. Only
    buffers that the layer made itself are written over, and only while nobody else was given them (`tensors`).
    """

    names = ("conv_states", "recurrent_states")
    conv_states: Any  # None before the first pass
    recurrent_states: Any

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.state_dtype = dtype
        self.record_past = False
        self.rounds = True
        self.journal: Journal | None = None
        self._pending_step: Step | None = None
        self._pending_journal: Journal | None = None
        self._buffers: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they get the state, and no buffer is shared."""
        self._buffers = []
        return dict(vars(self))

    @property
    def is_croppable(self) -> bool:
        return self.record_past or self.recurrent_states is None

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def steps(self) -> bool:
        """Whether the layer holds a state to step from."""
        return self.recurrent_states is not None and self.conv_states is not None

    def buffer(self, layout: Layout) -> Tensor | None:
        """Where this pass may write its final state, never the old one: with a journal, which keeps that, memory of its
        own. None where a kernel must not write: under grad, since a graph may hold the states."""
        state_BHPN = self.recurrent_states
        if tracing() or state_BHPN is None or layout.tokens > STEP_TOKENS:
            return None
        if torch.is_grad_enabled() or not state_BHPN.is_cpu or state_BHPN.dtype != self.state_dtype:
            return None
        if self.record_past:
            return torch.empty_like(state_BHPN, memory_format=torch.contiguous_format)
        for buffer in self._buffers:
            if buffer is not state_BHPN and buffer.shape == state_BHPN.shape:
                return buffer
        buffer = torch.empty_like(state_BHPN, memory_format=torch.contiguous_format)
        self._buffers = [*(kept for kept in self._buffers if kept is state_BHPN), buffer]
        return buffer

    def tensors(self) -> dict[str, Tensor]:
        self._buffers = []  # who looks may keep what he sees
        return super().tensors()

    def at_rest(self, state_BHPN: Tensor) -> Tensor:
        """The state in `mamba_ssm_cache_dtype`; a float64 model keeps float64, and between two pieces of one pass
        (`rounds` is False) nothing is rounded."""
        wide = state_BHPN.dtype == torch.float64 and self.state_dtype == torch.float32
        return state_BHPN if wide or not self.rounds else state_BHPN.to(self.state_dtype)

    def unrecorded(self, layout: Layout) -> int:
        """Tokens at the front of a long pass that need not be taken back: the caller scans them by themselves, so that
        the journal starts behind them. None of a padded pass, whose rows end at different tokens."""
        return max(0, layout.tokens - JOURNAL) if self.record_past and layout.valid_BT is None else 0

    def record(self, step: Step, start: int, state_BHPN: Tensor | None) -> None:
        """Hand over what this pass fed to the recurrence; the journal may begin at its token `start`, before which the
        state was `state_BHPN`."""
        if not self.record_past:
            return
        if start:
            front_BC = step.xBC_BTC[:, :start]
            assert self.pending is not None  # `update` comes first
            window_BCW = next_window(front_BC, self.conv_states, self.pending[0].shape[2], None)
            self._pending_journal = Journal(window_BCW, state_BHPN, self.at_rest)
            step = step.tail(start)
        self._pending_step = step

    def commit(self, slots: int) -> None:
        if self._buffers and self.pending is not None and not any(b is self.pending[1] for b in self._buffers):
            self._buffers = []  # the old state is in one of them and may live on elsewhere
        before = self.conv_states, self.recurrent_states
        if self.in_place and self._pending_step is not None and self.conv_states is not None:
            before = self.conv_states.clone(), self.recurrent_states.clone()
        super().commit(slots)
        if self._pending_step is not None:
            if self._pending_journal is not None:
                self.journal = self._pending_journal
            if self.journal is None:
                self.journal = Journal(*before, self.at_rest)
            window_BCW: Any = self.conv_states
            self.journal.append(self._pending_step, window_BCW.shape[2])
        self._pending_step = self._pending_journal = None

    def remember(self) -> Callable[[], None]:
        put_back = super().remember()
        if self.journal is not None:
            self.journal = self.journal.copy()
        return put_back

    def map_batch(self, change: Any) -> None:
        super().map_batch(change)
        if self.journal is not None:
            self.journal.map_batch(change)

    def join(self, others: Sequence[Any]) -> None:
        super().join(others)
        self._buffers = [self.recurrent_states]

    def drop(self, row: int) -> None:
        others = [buffer[:-1] for buffer in self._buffers if buffer is not self.recurrent_states]
        super().drop(row)
        self._buffers = [self.recurrent_states, *others]

    def reset(self) -> None:
        if self.in_place and self.conv_states is not None:
            self.conv_states.zero_()
            self.recurrent_states.zero_()
        else:
            super().reset()
        self.pending = self.journal = self._pending_step = self._pending_journal = None
        self._buffers = []

    def take_back(self, slots: int, length: int) -> None:
        if slots >= length:
            self.reset()
        elif self.journal is not None and slots > 0:
            window_BCW, state_BHPN = self.journal.take_back(slots, self.conv_states.shape[2])
            zero = torch.zeros_like
            self.keep("conv_states", zero(self.conv_states) if window_BCW is None else window_BCW)
            self.keep("recurrent_states", zero(self.recurrent_states) if state_BHPN is None else state_BHPN)
        self.journal = None

    def can_take_back(self, slots: int, length: int) -> bool:
        recorded = 0 if self.journal is None else self.journal.slots
        return slots == 0 or slots >= length or self.recurrent_states is None or slots <= recorded


LAYERS: dict[str, Any] = {
    "mamba": lambda config: MambaLayer(getattr(torch, config.mamba_ssm_cache_dtype)),
    "attention": lambda config: AttentionLayer(),
}
"""Block type to cache layer; block types that are not listed keep no state."""


def layers_of(types: Sequence[str], config: NemotronHConfig) -> list[CacheLayer]:
    """A layer for each block type."""
    return [LAYERS.get(name, lambda _: CacheLayer())(config) for name in types]
