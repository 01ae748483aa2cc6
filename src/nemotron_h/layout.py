"""Where the tokens of a forward pass stand: padding, packed documents, and what lies before them in the cache.

Letters: B batch · T tokens of this pass · S slots, cached ones and then this pass's T.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.errors import InputError
from nemotron_h.ops.router import Routing
from nemotron_h.ops.tracing import tracing


@dataclass
class Recorder:
    """What a caller asked to see of the inside, by layer; filled during the pass (again, when it is recomputed)."""

    attentions: dict[int, Tensor] | None = None
    routings: dict[int, Routing] | None = None
    ssm_states: dict[int, Tensor] | None = None
    mtp_routings: dict[int, dict[int, Routing]] | None = None

    def at_depth(self, depth: int) -> Recorder | None:
        """What is recorded of an MTP head's depth: the routings that the losses need."""
        return None if self.mtp_routings is None else Recorder(routings=self.mtp_routings.setdefault(depth, {}))

    def router_logits(self) -> tuple[Tensor, ...] | None:
        return None if self.routings is None else tuple(self.routings[i].logits for i in sorted(self.routings))


def ordered(by_layer: dict[int, Any] | None) -> tuple[Any, ...] | None:
    """What a recorder holds, in layer order."""
    return None if by_layer is None else tuple(by_layer[index] for index in sorted(by_layer))


class Visibility(NamedTuple):
    """What the tokens of a pass see, as `ops.attention` takes it."""

    visible: Tensor | None = None
    causal: bool = False
    past: int = 0
    window: int | None = None


@dataclass
class Layout:
    """What a mixer must know about its tokens beside their hidden states.

    valid_BT       False at padding; None when every token is real.
    slots_valid_BS the same for cached and present tokens; None when all are real.
    seq_idx_BT     document of each token in a packed row, ascending; None when rows are single documents.
    past           slots in the cache before this pass; an integer tensor [] in a cache of fixed shapes.
    capacity       slots of a cache of fixed shapes, of which the last may be empty; None in one that grows.
    recorder       where mixers leave what the caller wants to see, if anything.
    tokens         T.
    """

    tokens: int
    past: int | Tensor = 0
    valid_BT: Tensor | None = None
    slots_valid_BS: Tensor | None = None
    seq_idx_BT: Tensor | None = None
    recorder: Recorder | None = None
    capacity: int | None = None
    _visible: dict[int | None, Tensor] = field(default_factory=dict)
    _order: tuple[Tensor, Tensor] | None = None

    def first(self, tokens: int, recorder: Recorder | None = None) -> Layout:
        """The layout of the first `tokens` tokens alone, without a cache and with a recorder of its own."""
        valid_BT = None if self.valid_BT is None else self.valid_BT[:, :tokens]
        seq_idx_BT = None if self.seq_idx_BT is None else self.seq_idx_BT[:, :tokens]
        return Layout(tokens, 0, valid_BT, valid_BT, seq_idx_BT, recorder)

    def compacted(self) -> Layout:
        """The layout of compacted rows, without a cache; nothing of it is recorded."""
        valid_BT = self.compact_valid_BT()
        return Layout(self.tokens, 0, valid_BT, valid_BT, self.compact_seq_idx_BT())

    @property
    def is_plain(self) -> bool:
        """Whether the rows are single documents without padding, and nobody asked for the states behind them."""
        unseen = self.recorder is None or self.recorder.ssm_states is None
        return self.valid_BT is None and self.seq_idx_BT is None and unseen

    def zero_padding(self, x_BTC: Tensor) -> Tensor:
        return x_BTC if self.valid_BT is None else torch.where(self.valid_BT[..., None], x_BTC, 0)

    @property
    def lengths_B(self) -> Tensor | None:
        """Real tokens of each row, or None when all are."""
        return None if self.valid_BT is None else self.valid_BT.sum(-1)

    def compact(self, x_BTC: Tensor) -> Tensor:
        """Move each row's real tokens to its front, in order: recurrences then never meet padding."""
        return x_BTC if self.valid_BT is None else _take(x_BTC, self._orders()[0])

    def expand(self, x_BTC: Tensor) -> Tensor:
        """Undo `compact`. Where x lacks the last n tokens, the result lacks the last n slots."""
        if self.valid_BT is None:
            return x_BTC
        missing = self.tokens - x_BTC.shape[1]
        padded = F.pad(x_BTC, (0, 0) * (x_BTC.dim() - 2) + (0, missing)) if missing else x_BTC
        return _take(padded, self._orders()[1])[:, : x_BTC.shape[1]]

    def compact_valid_BT(self) -> Tensor | None:
        """`valid_BT` of compacted rows."""
        lengths_B = self.lengths_B
        if lengths_B is None:
            return None
        return torch.arange(self.tokens, device=lengths_B.device) < lengths_B[:, None]

    def compact_seq_idx_BT(self) -> Tensor | None:
        """`seq_idx_BT` of compacted rows; padding at the end continues the last document."""
        if self.seq_idx_BT is None or self.valid_BT is None:
            return self.seq_idx_BT
        moved_BT = self.seq_idx_BT.gather(1, self._orders()[0])
        padding_BT = self.compact_valid_BT()
        assert padding_BT is not None
        return torch.where(padding_BT, moved_BT, self.seq_idx_BT.amax(-1, keepdim=True))

    def _orders(self) -> tuple[Tensor, Tensor]:
        if self._order is None:
            assert self.valid_BT is not None
            order_BT = self.valid_BT.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
            self._order = order_BT, order_BT.argsort(dim=-1)
        return self._order

    def visibility(self, window: int | None, device: torch.device) -> Visibility:
        """Which slots a token sees: by its place alone, where that says it all, or by a mask [B or 1, 1, T, S].

        A padding token sees itself and what a real one would, so that no row of a softmax is empty.
        """
        if self.slots_valid_BS is None and self.seq_idx_BT is None and not isinstance(self.past, Tensor):
            slots = self.past + self.tokens
            near = None if window is None or window >= slots else window
            if self.tokens == 1 and near is None:
                return Visibility()
            return Visibility(causal=True, past=self.past, window=near)
        if window not in self._visible:
            self._visible[window] = self._make_visible(window, device)
        return Visibility(self._visible[window])

    def _make_visible(self, window: int | None, device: torch.device) -> Tensor:
        own_T = torch.arange(self.tokens, dtype=torch.int32, device=device) + self.past
        if isinstance(self.past, Tensor):
            assert self.capacity is not None
            slots = self.capacity
        else:
            slots = self.past + self.tokens
        slot_S = torch.arange(slots, dtype=torch.int32, device=device)
        seen = (slot_S <= own_T[:, None])[None, None]
        if self.slots_valid_BS is not None:
            seen = seen & self.slots_valid_BS[:, None, None, :slots]
        if self.seq_idx_BT is not None:
            document_BT = self.seq_idx_BT.int()
            seen = seen & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
        if window is not None:
            position = slot_S[None] if self.slots_valid_BS is None else self.slots_valid_BS[:, :slots].long().cumsum(-1)
            seen = seen & (position[:, own_T.long(), None] - position[:, None] < window)[:, None]
        return seen if self.slots_valid_BS is None else seen | (slot_S == own_T[:, None])


def _take(x_BTC: Tensor, order_BT: Tensor) -> Tensor:
    index = order_BT.reshape(order_BT.shape + (1,) * (x_BTC.dim() - 2)).expand(x_BTC.shape)
    return x_BTC.gather(1, index)


def validity(attention_mask: Tensor | None, batch: int, tokens: int, past: int | Tensor) -> Tensor | None:
    """`valid_BT` of this pass from a 2-D mask over its tokens, or over cached and present ones.

    Returns None when all tokens are real, which a traced or meta tensor cannot tell.

    Raises:
        InputError: other shapes, or values other than 0 and 1.
    """
    if attention_mask is None:
        return None
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if not fits or (attention_mask.shape[1] != tokens and attention_mask.shape[1] != past + tokens):
        raise InputError(
            f"attention_mask must be [batch, tokens] = [{batch}, {tokens}]"
            + (f" or [{batch}, {past + tokens}] with the cached ones" if past else "")
            + f", 1 for real tokens and 0 for padding; got {list(attention_mask.shape)}"
        )
    mask_BT = attention_mask[:, -tokens:] if tokens else attention_mask[:, :0]
    if not readable(mask_BT):
        return mask_BT.bool()
    if mask_BT.dtype != torch.bool and bool(((mask_BT != 0) & (mask_BT != 1)).any()):
        raise InputError("attention_mask must hold 1 for real tokens and 0 for padding; got other values")
    return None if bool(mask_BT.all()) else mask_BT.bool()


def documents(
    batch: int,
    tokens: int,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """`seq_idx_BT` from whichever description of packed rows is given; None when rows are single documents.

    Raises:
        InputError: shapes that do not fit, or document numbers that descend.
    """
    if seq_idx is not None:
        if seq_idx.shape != (batch, tokens):
            raise InputError(f"seq_idx must be [batch, tokens] = [{batch}, {tokens}], got {list(seq_idx.shape)}")
        if readable(seq_idx) and bool((seq_idx.diff(dim=-1) < 0).any()):
            raise InputError("seq_idx must not descend along a row: documents are packed one after the other")
        return seq_idx.long()
    if cu_seq_lens is not None:
        return _from_lengths(batch, tokens, cu_seq_lens)
    if position_ids is None or tokens < 2:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens or position_ids.shape[0] not in (1, batch):
        raise InputError(f"position_ids must be [{batch}, {tokens}], got {list(position_ids.shape)}")
    starts_BT = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    if readable(starts_BT) and not bool(starts_BT.any()):
        return None
    return starts_BT.long().cumsum(-1).expand(batch, -1)


def _from_lengths(batch: int, tokens: int, cu_seq_lens: Tensor) -> Tensor:
    bad = batch != 1 or cu_seq_lens.dim() != 1 or cu_seq_lens.shape[0] < 2
    if not bad and readable(cu_seq_lens):
        bad = int(cu_seq_lens[0]) != 0 or int(cu_seq_lens[-1]) != tokens or bool((cu_seq_lens.diff() < 0).any())
    if bad:
        raise InputError(f"cu_seq_lens_q must ascend from 0 to the {tokens} tokens of a single row, got {cu_seq_lens}")
    token_T = torch.arange(tokens, device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens[1:].long().contiguous(), token_T, right=True)[None]


def readable(t: Tensor) -> bool:
    """Whether Python may look at the values: not on `meta`, not while tracing."""
    return not tracing() and not t.is_meta and type(t) is Tensor
