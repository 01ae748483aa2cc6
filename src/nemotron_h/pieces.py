"""A long pass in pieces, one after the other, so that its activations take memory that does not grow with its tokens.

Nobody can tell but by the memory: the pieces meet where the scan's own chunks do, so the kernels give the bits of one
pass. What a caller watches (hooks, attentions, routings, all hidden states) shows one pass, so then it is one, and so
it is where gradients are wanted, in training, while tracing, and where a block may not be cut.

Letters: B batch · T tokens of the pass · n kept positions of a row · D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from nemotron_h.cache import LAYERS, NemotronHHybridDynamicCache
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.layout import Layout, readable
from nemotron_h.points import watched

PIECE = 2048  # tokens of a row
GRAIN = 64  # csrc/kernels/ssd_scan.cpp counts its chunks of so many real tokens from the start of a call or a document
KEYS = 256  # csrc/kernels/attention.cpp adds over blocks of so many slots, counted from the first of the cache

Run = Callable[[slice, slice, Layout, NemotronHHybridDynamicCache | None], Tensor]


class Part(NamedTuple):
    """Rows whose slots are read piece by piece, each behind the ones before: documents side by side where `packed`.

    `lead` slots in front of the first piece are read too, as padding: keys then lie in blocks as in the whole row.
    """

    rows: slice
    pieces: list[slice]
    packed: bool = False
    lead: int = 0


class Trunk(Protocol):
    """The model that runs a pass."""

    layers: nn.ModuleList
    training: bool

    def modules(self) -> Iterator[nn.Module]: ...


def plan(model: Trunk, tokens: Tensor, layout: Layout) -> list[Part] | None:
    """How the pass over `tokens` (ids [B, T] or embeddings [B, T, D]) is cut; None: not at all."""
    if layout.tokens < PIECE + GRAIN or model.training or torch.is_grad_enabled():
        return None
    if not readable(tokens) or not tokens.is_cpu or _is_recorded(layout) or not _may_be_cut(model):
        return None
    if layout.seq_idx_BT is None:
        return [Part(slice(None), list(cuts(layout.tokens, _joints(layout.valid_BT, layout.tokens))))]
    return [part for row in range(layout.seq_idx_BT.shape[0]) for part in _parts_of_row(row, layout)]


def _is_recorded(layout: Layout) -> bool:
    seen = layout.recorder
    return seen is not None and any(value is not None for value in vars(seen).values())


def _may_be_cut(model: Trunk) -> bool:
    """Whether every mixer goes on from its cache as if it had read the text at once, and nobody watches a module."""
    for block in model.layers:
        of_package = "fused" in vars(type(block.mixer))
        if not of_package and block.block_type not in LAYERS:
            return False
    if torch_module._has_any_global_hook():
        return False
    return not any(watched(module) for module in model.modules())


def _joints(valid_BT: Tensor | None, tokens: int, first: int = 0) -> Tensor:
    """Slots [n] of first .. tokens in front of which a pass may be cut without another bit: every row has then seen
    whole grains of real tokens. Rows that share none but the first are cut all the same, and differ by rounding."""
    if valid_BT is None:
        return torch.arange(first, tokens, GRAIN)
    seen_BT = valid_BT[:, first:tokens].cumsum(-1)
    return first + 1 + (seen_BT % GRAIN == 0).all(0).nonzero()[:, 0]


def cuts(tokens: int, joints: Tensor | None = None, first: int = 0, size: int = PIECE) -> Iterator[slice]:
    """Slices of first .. tokens, of `size` tokens or as near below as `joints` allow (default: multiples of the grain,
    whatever `size`); the last has a grain at least, so that it is no decode step."""
    joints = torch.arange(first, tokens, GRAIN) if joints is None else joints
    while tokens - first >= size + GRAIN:
        fitting = joints[(joints > first) & (joints <= first + size)]
        end = int(fitting[-1]) if len(fitting) else first + size
        yield slice(first, end)
        first = end
    yield slice(first, tokens)


def _parts_of_row(row: int, layout: Layout) -> Iterator[Part]:
    """Documents of a packed row: as many as fit a piece at once, a longer one by itself, in pieces."""
    assert layout.seq_idx_BT is not None
    rows = slice(row, row + 1)
    valid_BT = None if layout.valid_BT is None else layout.valid_BT[rows]
    starts = [0, *(layout.seq_idx_BT[row].diff().nonzero()[:, 0] + 1).tolist(), layout.tokens]
    begin = 0
    for start, end in pairwise(starts):
        if end - begin <= PIECE:
            continue
        if start > begin:
            yield Part(rows, [slice(begin, start)], True, begin % KEYS)
        begin = start
        if end - start > PIECE:
            yield Part(rows, list(cuts(end, _joints(valid_BT, end, start), start)), False, start % KEYS)
            begin = end
    if begin < layout.tokens:
        yield Part(rows, [slice(begin, layout.tokens)], True, begin % KEYS)


def read(
    parts: list[Part],
    layout: Layout,
    cache: NemotronHHybridDynamicCache | None,
    config: NemotronHConfig,
    batch: int,
    kept_Bn: Tensor | None,
    run: Run,
) -> Tensor:
    """Hidden states [B, T, D] of all tokens, or [B, n, D] of the positions `kept_Bn`.

    The cache, if there is one, holds all tokens afterwards. An error in any piece leaves the cache as it was.

    Args:
        run: Hidden states behind the final norm of a slice of rows and one of slots, with their layout and cache.
    """
    found = _Found(batch, layout.tokens, kept_Bn)
    if cache is not None:
        with cache.all_or_none():
            _read_part(parts[0], layout, cache, batch, found, run)
            return found.states
    for part in parts:
        own = NemotronHHybridDynamicCache(config) if len(part.pieces) > 1 else None
        _read_part(part, layout, own, len(range(batch)[part.rows]), found, run)
    return found.states


def _read_part(
    part: Part, layout: Layout, cache: NemotronHHybridDynamicCache | None, batch: int, found: _Found, run: Run
) -> None:
    if cache is not None:
        cache.expect(part.pieces[-1].stop - part.pieces[0].start + part.lead)
    for index, slots in enumerate(part.pieces):
        if cache is not None:
            cache.round_states(index == len(part.pieces) - 1)
        lead = 0 if index else part.lead
        here = _layout_of(part, slots, lead, layout, cache, batch)
        x_BTD = run(part.rows, slice(slots.start - lead, slots.stop), here, cache)
        found.put(part.rows, slots, x_BTD[:, lead:])
        if cache is not None:
            cache.commit(batch, here.tokens, here.slots_valid_BS)
    if cache is not None:
        cache.expect(0)


def _layout_of(
    part: Part, slots: slice, lead: int, layout: Layout, cache: NemotronHHybridDynamicCache | None, batch: int
) -> Layout:
    read = slice(slots.start - lead, slots.stop)
    tokens = read.stop - read.start
    valid_BT = torch.ones(batch, tokens, dtype=torch.bool)
    if layout.valid_BT is not None:
        valid_BT = layout.valid_BT[part.rows, read].clone()
    valid_BT[:, :lead] = False
    real_BT = None if bool(valid_BT.all()) else valid_BT
    if cache is None:
        seq_idx_BT = layout.seq_idx_BT[part.rows, read] if part.packed and layout.seq_idx_BT is not None else None
        return Layout(tokens, 0, real_BT, real_BT, seq_idx_BT)
    slots_valid_BS = cache.slots_valid(real_BT, batch, tokens, valid_BT.device)
    return Layout(tokens, cache.past, real_BT, slots_valid_BS, None, None, cache.capacity)


class _Found:
    """Gathers what is kept of the hidden states, in one tensor."""

    def __init__(self, batch: int, tokens: int, kept_Bn: Tensor | None) -> None:
        self.batch, self.kept_Bn = batch, kept_Bn
        self.count = tokens if kept_Bn is None else kept_Bn.shape[1]
        self._states: Tensor | None = None

    @property
    def states(self) -> Tensor:
        assert self._states is not None
        return self._states

    def put(self, rows: slice, slots: slice, x_BTD: Tensor) -> None:
        if self._states is None:
            self._states = x_BTD.new_empty(self.batch, self.count, x_BTD.shape[2])
        if self.kept_Bn is None:
            self._states[rows, slots] = x_BTD
            return
        kept_Bn = self.kept_Bn[rows]
        row, place = ((kept_Bn >= slots.start) & (kept_Bn < slots.stop)).nonzero(as_tuple=True)
        self._states[rows][row, place] = x_BTD[row, kept_Bn[row, place] - slots.start]
