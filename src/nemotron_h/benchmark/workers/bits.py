"""Whether the ways that are measured give the bits of the slow ones: one row, one piece, one sequence at a time.

Letters: B = 1 row · T tokens · V vocabulary · M rows of a layer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h import LLM, NemotronHForCausalLM, NemotronHHybridDynamicCache, SamplingParams
from nemotron_h.experts import NemotronHExperts, NemotronHPackedExperts
from nemotron_h.linears import NemotronHLinear, NemotronHPackedLinear

PIECE = 64  # where a prompt may be cut: at the scan's chunks
SHORT, WRITTEN = 16, 8  # tokens of a batch's prompts, and behind them
_PROBABILITIES = 20
_ROWS = 16
_LAYERS = (NemotronHLinear, NemotronHPackedLinear, NemotronHExperts, NemotronHPackedExperts)

Compared = tuple[int, int]  # how many numbers, and how many of them have other bits


def compare(model: NemotronHForCausalLM, tokens: int, sequences: int) -> dict[str, Any]:
    """Numbers compared and differing, by the way; `rounding` is the one that promises nothing."""
    prompt = random_prompts(model.config.vocab_size, 1, tokens)
    ids_BT = torch.tensor(prompt)
    whole_BTV = read(model, ids_BT, [tokens])
    found = {
        "a prompt against pieces of it": count(whole_BTV, read(model, ids_BT, [PIECE] * (tokens // PIECE))),
        "rows of layers against each alone": rows(model, ids_BT),
        "a batch against each alone": batch(model, sequences),
    }
    return {
        "compared": {way: pair[0] for way, pair in found.items()},
        "differing": {way: pair[1] for way, pair in found.items()},
        "rounding": count(whole_BTV, read(model, ids_BT, [1] * tokens)),
    }


@torch.no_grad()
def read(model: NemotronHForCausalLM, ids_BT: Tensor, pieces: Sequence[int]) -> Tensor:
    """Logits [B, T, V] of a prompt that is read in pieces; the last one takes what is left."""
    cache, start, parts = NemotronHHybridDynamicCache(model.config), 0, []
    for size in [*pieces, ids_BT.shape[1]]:
        piece_BT = ids_BT[:, start : start + size]
        if piece_BT.shape[1]:
            parts.append(model(piece_BT, past_key_values=cache, use_cache=True).logits)
        start += size
    return torch.cat(parts, 1)


@torch.no_grad()
def rows(model: NemotronHForCausalLM, ids_BT: Tensor) -> Compared:
    """Outputs of every linear layer and of the routed experts, for all tokens of a prompt at once, against those for
    some of the rows alone."""
    seen: list[tuple[nn.Module, list[Tensor], Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((layer, [_by_rows(x) for x in inputs], _by_rows(output)))

    handles = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, _LAYERS)]
    try:
        model(ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    total = differing = 0
    for layer, inputs, output in seen:
        for row in range(0, len(output), max(1, len(output) // _ROWS)):
            alone = _by_rows(layer(*(x[row : row + 1] for x in inputs)))
            one, other = count(output[row : row + 1], alone)
            total, differing = total + one, differing + other
    return total, differing


def batch(model: NemotronHForCausalLM, sequences: int) -> Compared:
    """The likeliest tokens and their probabilities, of texts that `LLM.generate` writes together, and of each alone."""
    vocab = model.config.vocab_size
    prompts = random_prompts(vocab, sequences, SHORT)
    params = SamplingParams(
        max_tokens=WRITTEN, temperature=0.0, ignore_eos=True, logprobs=min(_PROBABILITIES, vocab)
    )  # fmt: skip
    llm = LLM(model, threads=torch.get_num_threads(), max_num_seqs=sequences)
    total = differing = 0
    for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True):
        alone = llm.generate([prompt], params)[0]
        for own, other in zip(alone.logprobs or [], result.logprobs or [], strict=True):
            total += len(own)
            differing += sum(other.get(token) != value for token, value in own.items())
    return total, differing


def random_prompts(vocab: int, number: int, tokens: int) -> list[list[int]]:
    drawn = random.Random(number)
    return [drawn.choices(range(vocab), k=tokens) for _ in range(number)]


def count(a: Tensor, b: Tensor) -> Compared:
    """NaN is like any other NaN."""
    return a.numel(), int(((a != b) & ~(a.isnan() & b.isnan())).sum())


def _by_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
