"""What the workers of PyTorch models share: random weights, and decoding token by token.

Letters: S steps · B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemotron_h.initialization import initialize

FILL = 512  # tokens of a pass that fills the context
PASS = 2048  # tokens of a pass through a prompt: longer ones gain nothing and take memory
SHORT = 16  # tokens of the prompts of sequences that decode together
_WARM_UP = 4
Step = Callable[[Tensor, Any, int], tuple[Tensor, Any]]
Model = TypeVar("Model", bound=PreTrainedModel)


def random_weights(make: Callable[[], Model], config: Any, dtype: torch.dtype, seed: int) -> Model:
    """A model in eval mode, filled tensor by tensor: `make` builds it, without memory, on the meta device.

    Buffers (the routers' biases) keep their dtype and are zero.
    """
    with torch.device("meta"):
        model = make()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device="cpu").requires_grad_(False)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        initialize(name, parameter, config, generator)
    for buffer in model.buffers():
        buffer.zero_()
    return model.eval()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Decoder:
    """Random tokens through a model, one at a time, behind a context of random tokens.

    Args:
        step: Token ids [B, T], a cache or None to start anew, and how many logits of each row to keep, to the logits of
            its last tokens [B, kept, V] and the cache.
        rows: Sequences that decode together.
    """

    def __init__(self, step: Step, vocab: int, rows: int = 1) -> None:
        self._step, self._vocab, self._rows = step, vocab, rows
        self._cache: Any = None
        self._length = 0
        self._random = random.Random(0)

    def fill(self, context: int) -> None:
        """Come to stand behind `context` tokens, and warm up; tokens that are there already are kept."""
        if self._length > context or context == 0:
            self._cache, self._length = None, 0
        while self._length < context:
            self._forward(self._draw(min(FILL, context - self._length)))
        for _ in range(_WARM_UP):
            self._forward(self._draw(1))

    def decode(self, steps: int, tokens: int = 1) -> dict[str, Any]:
        """Steps of `tokens` tokens, with the logits of each: how many of all rows, in how many seconds, and whether
        all logits of the last step were finite."""
        ids_SBT = [self._draw(tokens) for _ in range(steps)]
        return {"tokens": steps * tokens * self._rows, **self._timed(ids_SBT, tokens)}

    def turn(self, steps: int, tokens: int = 1) -> dict[str, Any]:
        """As `decode`, behind a step that is not timed: what other engines did meanwhile has emptied the caches."""
        self._forward(self._draw(tokens), tokens)
        return self.decode(steps, tokens)

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A prompt from an empty cache, in passes of `PASS`, with the logits of its last token. Leaves the cache alone
        that decoding has."""
        fresh = Decoder(self._step, self._vocab)
        pieces = [fresh._draw(min(PASS, tokens - start)) for start in range(0, tokens, PASS)]
        return {"tokens": tokens, **fresh._timed(pieces, 1)}

    def _timed(self, ids_SBT: list[Tensor], keep: int) -> dict[str, Any]:
        start, logits_BTV = time.perf_counter(), torch.empty(0)
        for ids_BT in ids_SBT:
            logits_BTV = self._forward(ids_BT, keep)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "finite": math.isfinite(float(logits_BTV.float().sum()))}

    def _draw(self, tokens: int) -> Tensor:
        return torch.tensor([self._random.choices(range(self._vocab), k=tokens) for _ in range(self._rows)])

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor, keep: int = 1) -> Tensor:
        logits_BTV, self._cache = self._step(ids_BT, self._cache, keep)
        self._length += ids_BT.shape[1]
        return logits_BTV


class TorchWorker:
    """Actions that all workers with a PyTorch model share, once `decoder` is there."""

    decoder: Decoder

    def fill(self, context: int) -> None:
        self.decoder.fill(context)

    def decode(self, tokens: int) -> dict[str, Any]:
        return self.decoder.turn(tokens)

    def verify(self, steps: int, tokens: int) -> dict[str, Any]:
        return self.decoder.turn(steps, tokens)

    def prefill(self, tokens: int) -> dict[str, Any]:
        return self.decoder.prefill(tokens)
