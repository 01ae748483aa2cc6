"""llama.cpp through llama-cpp-python, in a process of its own.

It runs under any Python that has `llama_cpp`, so it uses nothing of this package.
"""

import ctypes
import math
import os
import random
import time
from importlib import import_module
from typing import Any

FILL = 512  # tokens of a pass that fills the context
_WARM_UP = 4


class Worker:
    """Actions: `load`, then `fill` and `decode` in any order."""

    def __init__(self) -> None:
        self._llama: Any = import_module("llama_cpp")

    def load(self, path: str, vocab: int, context: int, threads: int) -> dict[str, Any]:
        """Map a GGUF file, as is llama.cpp's default, with room for `context` tokens; the seconds include the first
        token. The file may be removed afterwards."""
        start = time.perf_counter()
        self._llama.llama_backend_init()
        self._model = self._llama.llama_model_load_from_file(
            os.fsencode(path), self._llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = self._llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, FILL, FILL
        params.n_threads = params.n_threads_batch = threads
        self._context = self._llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no memory for a context of {context} tokens")
        self._vocab, self._length, self._random = vocab, 0, random.Random(0)
        self._forward(1)
        return {
            "seconds": time.perf_counter() - start,
            "weight_bytes": self._llama.llama_model_size(self._model),
            "version": self._llama.__version__,
        }

    def fill(self, context: int) -> None:
        """Come to stand behind `context` tokens, and warm up; tokens that are there already are kept."""
        if self._length > context or context == 0:
            self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
            self._length = 0
        while self._length < context:
            self._forward(min(FILL, context - self._length))
        for _ in range(_WARM_UP):
            self._forward(1)

    def decode(self, tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(tokens):
            self._forward(1)
        seconds = time.perf_counter() - start
        logits = self._llama.llama_get_logits(self._context)
        return {"seconds": seconds, "finite": all(math.isfinite(logits[i]) for i in range(self._vocab))}

    def _forward(self, count: int) -> None:
        ids = (ctypes.c_int32 * count)(*(self._random.randrange(self._vocab) for _ in range(count)))
        status = self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(ids, count))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} behind {self._length} tokens")
        self._llama.llama_synchronize(self._context)
        self._length += count
