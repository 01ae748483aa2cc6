"""A request and its texts while they grow.

Letters: V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Set

from torch import Tensor

from nemotron_h.cache import NemotronHHybridDynamicCache
from nemotron_h.generation.params import SamplingParams
from nemotron_h.generation.results import Completion, Event, Result, Usage
from nemotron_h.generation.sampler import Sampler, top_logprobs
from nemotron_h.generation.text import StopTexts, Text


class Sequence:
    """One sample of a request: row after row of logits becomes token after token, until `finished`.

    Args:
        ends: Tokens that end the text.
        room: Tokens after which it ends anyway, at least 1.
    """

    def __init__(
        self, ids: list[int], params: SamplingParams, sample: int, text: Text, ends: Set[int], room: int
    ) -> None:
        self.params, self.ends, self.room = params, ends, room
        self.sampler, self.decoder, self.stops = Sampler(params, ids, sample), text.decoder(), StopTexts(params.stops)
        self.events: list[Event] = []
        self.finished = False

    @property
    def token(self) -> int:
        """The last one, which the model has not read yet."""
        return self.sampler.said[-1]

    def advance(self, logits_V: Tensor) -> Event:
        """Choose the next token by float32 logits on the CPU."""
        event = self._next(logits_V)
        self.finished = event.finish_reason is not None
        self.events.append(event)
        if self.finished:
            del self.sampler, self.decoder, self.stops  # many samples of a long prompt would keep it many times
        return event

    def _next(self, logits_V: Tensor) -> Event:
        token = self.sampler.choose(logits_V)
        if token < 0:
            return Event(self.stops.finish(), None, None, "error", "the model's logits are not finite")
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = top_logprobs(logits_V.log_softmax(-1), token, self.params.logprobs)
        ended, last = token in self.ends, len(self.events) == self.room - 1
        text = self.stops.push("" if ended else self.decoder.push(token))
        if not self.stops.stopped and (ended or last):
            text += self.stops.push(self.decoder.finish())
            text += "" if self.stops.stopped else self.stops.finish()
        if ended or last or self.stops.stopped:
            return Event(text, token, logprobs, "stop" if ended or self.stops.stopped else "length")
        return Event(text, token, logprobs)

    def completion(self) -> Completion:
        """What was said, once `finished`."""
        last = self.events[-1]
        return Completion(
            text="".join(event.text for event in self.events),
            token_ids=[event.token_id for event in self.events if event.token_id is not None],
            finish_reason=last.finish_reason or "length",
            logprobs=None
            if self.params.logprobs is None
            else [event.logprobs for event in self.events if event.logprobs is not None],
            error=last.error,
        )


class Request:
    """A prompt and its n samples, which share what the model read of it."""

    def __init__(self, ids: list[int], params: SamplingParams, text: Text, ends: Set[int], room: int) -> None:
        self.ids, self.params = ids, params
        self.samples: list[Sequence] = []  # that have begun
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        self._how = text, ends, room
        self._logits_V: Tensor | None = None
        self._cache: NemotronHHybridDynamicCache | None = None

    @property
    def is_read(self) -> bool:
        return self._cache is not None

    @property
    def waits(self) -> bool:
        """Whether a sample has not begun."""
        return len(self.samples) < self.params.n

    def read(self, logits_TV: Tensor, next_ids: list[int], cache: NemotronHHybridDynamicCache) -> None:
        """What the model made of the prompt, or of one part after the other: float32 logits, of the last token at
        least, the tokens behind the first of them whose log-probabilities are wanted, and the cache."""
        count = self.params.prompt_logprobs
        if count is not None:
            rows = logits_TV[: len(next_ids)].log_softmax(-1)
            known = [top_logprobs(row_V, token, count) for row_V, token in zip(rows, next_ids, strict=True)]
            self.prompt_logprobs = [*(self.prompt_logprobs or [None]), *known]
        self._logits_V, self._cache = logits_TV[-1].clone(), cache

    def begin(self) -> tuple[Sequence, Event, NemotronHHybridDynamicCache | None]:
        """The next sample's first token, and a cache of its own, unless that was all."""
        assert self._logits_V is not None
        sequence = Sequence(self.ids, self.params, len(self.samples), *self._how)
        self.samples.append(sequence)
        event, cache = sequence.advance(self._logits_V), self._cache
        if not self.waits:
            self._logits_V = self._cache = None
        elif not sequence.finished:
            cache = copy.deepcopy(cache)
        return sequence, event, None if sequence.finished else cache

    def result(self) -> Result:
        outputs = [sample.completion() for sample in self.samples]
        usage = Usage(len(self.ids), sum(len(output.token_ids) for output in outputs))
        return Result(self.ids, outputs, usage, self.prompt_logprobs)
