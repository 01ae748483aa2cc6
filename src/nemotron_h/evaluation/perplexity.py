"""Perplexity and bits per byte of a text, exact and in bounded memory.

Every token of the text is predicted once. A text of up to `context` tokens is one pass; a longer one is cut into
windows of `context` tokens that start every `stride` tokens, and each window counts the tokens that no earlier one has
predicted, so that all but those of the first window see `context - stride` tokens or more.

Letters: T tokens · V vocab_size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_h.cache import NemotronHHybridDynamicCache
from nemotron_h.errors import InputError
from nemotron_h.generation import LLM

CONTEXT = 4096  # tokens of a window unless told otherwise
BLOCK = 128  # predicted tokens that confidence treats as one observation: neighbours are not independent
_LOGITS = 2**24  # elements of logits at a time

Progress = Callable[[int, int], None]
"""(tokens done, tokens in all)"""


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval; None where there are fewer than two blocks."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TextScore:
    """What a text cost: `nll` in nats over `tokens` predicted tokens, which spell `bytes` bytes of UTF-8."""

    name: str
    tokens: int
    bytes: int
    nll: float
    windows: int
    seconds: float
    blocks: list[tuple[float, int, int]] = field(repr=False)  # (nats, tokens, bytes)

    @property
    def perplexity(self) -> Interval:
        """exp of the mean nats per token."""
        mean, low, high = _ratio([(nats, tokens) for nats, tokens, _ in self.blocks])
        return Interval(_exp(mean), None if low is None else _exp(low), None if high is None else _exp(high))

    @property
    def bits_per_byte(self) -> Interval:
        return _ratio([(nats / math.log(2), size) for nats, _, size in self.blocks])


def combine(scores: Sequence[TextScore], name: str = "total") -> TextScore:
    """Several texts as one."""
    return TextScore(
        name,
        sum(score.tokens for score in scores),
        sum(score.bytes for score in scores),
        math.fsum(score.nll for score in scores),
        sum(score.windows for score in scores),
        sum(score.seconds for score in scores),
        [block for score in scores for block in score.blocks],
    )


def score_text(
    llm: LLM,
    text: str,
    name: str = "text",
    context: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> TextScore:
    """Score a text.

    Args:
        text: Any Unicode text; it stands behind `bos_token_id` where the tokenizer has one, so that its first token
            is predicted too. Without one the first token is given, and its bytes do not count.
        context: Tokens of a window. Default: 4096, or the model's longest if that is less.
        stride: Tokens between the starts of windows. Default: half of `context`.

    Raises:
        InputError: no tokenizer, nothing to predict, sizes that mean nothing.
    """
    start = time.perf_counter()
    longest: int = llm.max_model_len
    window = min(CONTEXT, longest) if context is None else context
    step = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= longest or not 1 <= step < window:
        raise InputError(
            f"context={window}, stride={step}: expected 2 <= context <= {longest} (max_model_len) and"
            " 1 <= stride < context"
        )
    ids, ends = _encode(llm, text)
    if len(ids) < 2:
        raise InputError(f"{name}: nothing to predict, the text has {len(ids)} tokens; give a longer one")
    nats: list[float] = []
    windows = 0
    for first, last in _windows(len(ids), window, step):
        nats += _nats(llm, ids[first:last], counted=last - 1 - len(nats))
        windows += 1
        if progress is not None:
            progress(len(nats), len(ids) - 1)
    blocks = [
        (math.fsum(nats[i : i + BLOCK]), len(nats[i : i + BLOCK]), ends[min(i + BLOCK, len(nats))] - ends[i])
        for i in range(0, len(nats), BLOCK)
    ]
    size = ends[-1] - ends[0]
    return TextScore(name, len(nats), size, math.fsum(nats), windows, time.perf_counter() - start, blocks)


def _encode(llm: LLM, text: str) -> tuple[list[int], list[int]]:
    """Token ids with the start token in front, and for each the number of the text's bytes up to its end."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise InputError("this checkpoint has no tokenizer, so a text cannot be scored")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not Unicode (character {error.start})") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, starts = encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]
    # A character that several tokens spell ends with the last of them.
    byte_at = [0]
    for character in text:
        byte_at.append(byte_at[-1] + len(character.encode()))
    ends = [byte_at[begin] for begin in [*starts[1:], len(text)]]
    bos = tokenizer.bos_token_id
    return ([bos, *ids], [0, *ends]) if bos is not None else (ids, ends)


def _windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each window; the last one ends with the text."""
    first = 0
    while True:
        last = min(first + context, tokens)
        yield first, last
        if last == tokens:
            return
        first += stride


@torch.no_grad()
def _nats(llm: LLM, ids: list[int], counted: int) -> list[float]:
    """Negative log-likelihood of the last `counted` tokens, in pieces, so that logits stay small."""
    model, cache = llm.model, NemotronHHybridDynamicCache(llm.config)
    piece = max(16, _LOGITS // llm.config.vocab_size)
    nats: list[float] = []
    row_T = torch.tensor(ids, device=model.device)
    for begin in range(0, len(ids) - 1, piece):
        end = min(begin + piece, len(ids) - 1)
        wanted = min(end - begin, max(0, end - (len(ids) - 1 - counted)))
        keep: dict[str, Any] = {"logits_to_keep": max(1, wanted)}
        logits_TV = model(row_T[None, begin:end], past_key_values=cache, **keep).logits[0]
        if wanted:
            nats += _losses(logits_TV[-wanted:], row_T[end - wanted + 1 : end + 1]).tolist()
    return nats


def _losses(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_TV.double(), targets_T, reduction="none")


def _ratio(blocks: list[tuple[float, int]]) -> Interval:
    """Sum over sum, with the standard error of a ratio of block sums (linearized)."""
    total, weight = math.fsum(value for value, _ in blocks), sum(size for _, size in blocks)
    ratio, count = total / weight if weight else math.nan, len(blocks)
    if count < 2 or not math.isfinite(ratio):
        return Interval(ratio, None, None)
    squares = math.fsum((value - ratio * size) ** 2 for value, size in blocks)
    error = math.sqrt(squares * count / (count - 1)) / weight
    return Interval(ratio, ratio - 1.96 * error, ratio + 1.96 * error)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
