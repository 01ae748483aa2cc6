"""What the workers of PyTorch models share: random weights, and decoding token by token.

Letters: B = 1 row · T tokens · V vocabulary.
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
_WARM_UP = 4
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
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
        step: Token ids [1, T] and a cache, or None to start anew, to the last token's logits [1, V] and the cache.
    """

    def __init__(self, step: Step, vocab: int) -> None:
        self._step, self._vocab = step, vocab
        self._cache: Any = None
        self._length = 0
        self._random = random.Random(0)

    def fill(self, context: int) -> None:
        """Come to stand behind `context` tokens, and warm up; tokens that are there already are kept."""
        if self._length > context or context == 0:
            self._cache, self._length = None, 0
        while self._length < context:
            self._forward(min(FILL, context - self._length))
        for _ in range(_WARM_UP):
            self._forward(1)

    def decode(self, tokens: int) -> tuple[float, bool]:
        """Seconds for `tokens` tokens, and whether all logits of the last were finite."""
        start, logits_BV = time.perf_counter(), torch.empty(0)
        for _ in range(tokens):
            logits_BV = self._forward(1)
        return time.perf_counter() - start, math.isfinite(float(logits_BV.float().sum()))

    @torch.no_grad()
    def _forward(self, count: int) -> Tensor:
        ids_BT = torch.tensor([[self._random.randrange(self._vocab) for _ in range(count)]])
        logits_BV, self._cache = self._step(ids_BT, self._cache)
        self._length += count
        return logits_BV
