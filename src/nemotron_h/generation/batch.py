"""Sequences that decode together: one pass of the model reads its weights once and continues all of them.

Each keeps the bits that it has alone. A prompt is read by itself, at its own length, so no row is ever padded; a step
has one token of every sequence that holds a seat; and it has no more rows than the kernels take, of which each promises
that an output row depends on that row alone. A sequence that ends leaves its seat to the next one that waits.

Letters: B sequences that hold seats · T tokens · V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemotron_h.cache import BatchCache, NemotronHHybridDynamicCache
from nemotron_h.generation.results import Event
from nemotron_h.generation.sequence import Request, Sequence
from nemotron_h.linears import NemotronHLinear, NemotronHPackedLinear
from nemotron_h.modeling import NemotronHBlock, NemotronHForCausalLM
from nemotron_h.ops.dispatch import DTYPE_CODES
from nemotron_h.ops.linear.native import MOST_ROWS
from nemotron_h.pieces import GRAIN, PIECE, cuts
from nemotron_h.points import untouched
from nemotron_h.steps import BlockStep

Forward = Callable[[list[list[int]], NemotronHHybridDynamicCache, bool], Tensor]
"""(ids, cache to extend, whether all logits are wanted) to float32 logits [B, T or 1, V] on the CPU."""

_LOGITS = 2**25  # of a prompt, in memory at a time


@dataclass
class Phase:
    tokens: int = 0
    seconds: float = 0.0

    @contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.tokens += tokens
        self.seconds += time.perf_counter() - start


@dataclass
class Stats:
    """Passes of the model, and the tokens that it read in each phase."""

    steps: int = 0
    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)


def prompt_logits(
    forward: Forward, config: Any, ids: list[int], cache: NemotronHHybridDynamicCache
) -> Iterator[tuple[Tensor, list[int]]]:
    """Logits [t, V] of all tokens, some at a time, since those of a long prompt are larger than the model, and the
    tokens behind them: one fewer at the end."""
    size = min(PIECE, max(GRAIN, _LOGITS // config.vocab_size // GRAIN * GRAIN))
    for tokens in cuts(len(ids), size=size):
        cache.round_states(tokens.stop == len(ids))
        yield forward([ids[tokens]], cache, True)[0], ids[tokens.start + 1 : tokens.stop + 1]


def most_rows(model: NemotronHForCausalLM) -> int | None:
    """How many rows a decode step may have so that each keeps the bits that it has alone; None: any number.

    One where a part is somebody else's, or has no kernel that promises this: nothing is known of its sums.
    """
    trunk, config = model.model, model.config
    dtype = trunk.embeddings.weight.dtype
    if not untouched(trunk.norm_f) or not untouched(model.lm_head) or dtype not in DTYPE_CODES:
        return 1
    if getattr(torch, config.mamba_ssm_cache_dtype) not in DTYPE_CODES:
        return 1
    limits = [] if isinstance(model.lm_head, NemotronHPackedLinear) else [MOST_ROWS]
    if not isinstance(model.lm_head, NemotronHLinear | NemotronHPackedLinear):
        return 1
    stream = torch.float32 if config.residual_in_fp32 else dtype
    for block in trunk.layers:
        if type(block) is not NemotronHBlock or not isinstance(block.step, BlockStep):
            return 1
        limits.append(block.step.rows(block, stream, config.hidden_size))
    return min(limits, default=None)


class Batch:
    """Runs requests to their ends, as many texts at a time as there are seats.

    Args:
        config: The model's.
        forward: Runs it.
        stats: Is counted up.
        seats: Most rows of a step. With one, a text keeps the cache that its prompt filled, as any block type may
            want it; `most_rows` says when there may be more.
    """

    def __init__(self, config: Any, forward: Forward, stats: Stats, seats: int) -> None:
        self.config, self.forward, self.stats, self.seats = config, forward, stats, seats
        self.rows: list[Sequence] = []
        self._cache: NemotronHHybridDynamicCache = (
            BatchCache(config) if seats > 1 else NemotronHHybridDynamicCache(config)
        )

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Sequence, Event]]:
        """Every token of every sample, as it comes; nothing is computed before it is asked for."""
        waiting = deque(requests)
        while True:
            going, joining = sum(not sequence.finished for sequence in self.rows), []
            while waiting and going + len(joining) < self.seats:
                request = waiting[0]
                if not request.is_read:
                    self.read(request)
                sequence, event, cache = request.begin()
                if not request.waits:
                    waiting.popleft()
                if cache is not None:
                    joining.append((sequence, cache))
                yield sequence, event
            if not going and not joining:
                return
            yield from self._step(joining)

    def read(self, request: Request) -> None:
        """The prompt; a long one whose tokens' own log-probabilities are wanted is read some tokens at a time."""
        with self.stats.prefill.timed(len(request.ids)):
            cache = NemotronHHybridDynamicCache(self.config)
            if request.params.prompt_logprobs is None:
                request.read(self.forward([request.ids], cache, False)[0], [], cache)
                return
            for logits_TV, next_ids in prompt_logits(self.forward, self.config, request.ids, cache):
                request.read(logits_TV, next_ids, cache)

    def _step(self, joining: list[tuple[Sequence, NemotronHHybridDynamicCache]]) -> Iterator[tuple[Sequence, Event]]:
        """The next token of every text that goes on or joins."""
        going = sum(not sequence.finished for sequence in self.rows)
        with self.stats.decode.timed(going + len(joining)):
            self._settle(joining)
            logits_BTV = self.forward([[sequence.token] for sequence in self.rows], self._cache, False)
        for sequence, logits_TV in zip(self.rows, logits_BTV, strict=True):
            yield sequence, sequence.advance(logits_TV[0])

    def _settle(self, joining: list[tuple[Sequence, NemotronHHybridDynamicCache]]) -> None:
        """Seat those who join, first where texts have ended; then nobody sits in other such places."""
        if not isinstance(self._cache, BatchCache):
            for sequence, cache in joining:
                self.rows, self._cache = [sequence], cache
            return
        ended = [row for row, sequence in enumerate(self.rows) if sequence.finished]
        for row, (sequence, cache) in zip(ended, joining, strict=False):
            self._cache.replace(row, cache)
            self.rows[row] = sequence
        for row in reversed(ended[len(joining) :]):  # from the end: the last row, which moves, is one that goes on
            self._cache.drop(row)
            self.rows[row] = self.rows[-1]
            del self.rows[-1]
        if more := joining[len(ended) :]:
            self._cache.join([cache for _, cache in more])
            self.rows += [sequence for sequence, _ in more]
