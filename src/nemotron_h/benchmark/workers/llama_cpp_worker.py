"""llama.cpp through llama-cpp-python, in a process of its own.

It runs under any Python that has `llama_cpp`, so it uses nothing of this package.
"""

import math
import os
import random
import time
from importlib import import_module
from typing import Any

FILL = 512  # tokens of a pass, llama.cpp's default
SHORT = 16  # tokens before the first of sequences that decode together
_WARM_UP = 4


class Worker:
    """Actions: `load`, then the others in any order; `together` after `gather`."""

    def __init__(self) -> None:
        self._llama: Any = import_module("llama_cpp")
        self._random = random.Random(0)

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
        self._vocab, self._threads = vocab, threads
        self._one = Sequences(self, 1, context)
        self._many: Sequences | None = None
        self._one.step(1)
        return {
            "seconds": time.perf_counter() - start,
            "weight_bytes": self._llama.llama_model_size(self._model),
            "version": self._llama.__version__,
        }

    def fill(self, context: int) -> None:
        """Come to stand behind `context` tokens, and warm up; tokens that are there already are kept."""
        if self._one.length > context or context == 0:
            self._one.clear()
        while self._one.length < context:
            self._one.step(min(FILL, context - self._one.length))
        for _ in range(_WARM_UP):
            self._one.step(1)

    def decode(self, tokens: int) -> dict[str, Any]:
        return self._one.turn(tokens, 1)

    def verify(self, steps: int, tokens: int) -> dict[str, Any]:
        """Steps of several tokens, with the logits of each."""
        return self._one.turn(steps, tokens, all_logits=True)

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A prompt from an empty cache, with the logits of its last token."""
        self._one.clear()
        return self._one.timed([min(FILL, tokens - start) for start in range(0, tokens, FILL)])

    def gather(self, sequences: int, tokens: int) -> None:
        """Sequences with a short context each and room for `tokens` more, in a cache of their own."""
        if self._many is not None:
            self._many.free()
        room = -(-(SHORT + _WARM_UP + tokens) // 256) * 256
        self._many = Sequences(self, sequences, sequences * room)
        for _ in range(SHORT + _WARM_UP):
            self._many.step(1)

    def together(self, tokens: int) -> dict[str, Any]:
        assert self._many is not None
        return self._many.turn(tokens, 1)


class Sequences:
    """A context of llama.cpp with sequences that go through the model together."""

    def __init__(self, worker: Worker, count: int, room: int) -> None:
        self._worker, self._llama, self.count, self.length = worker, worker._llama, count, 0
        params = self._llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = room, FILL, FILL, count
        params.n_threads = params.n_threads_batch = worker._threads
        self._context = self._llama.llama_init_from_model(worker._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no memory for a context of {room} tokens")
        self._batch = self._llama.llama_batch_init(FILL, 0, 1)

    def free(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self.length = 0

    def turn(self, steps: int, tokens: int, all_logits: bool = False) -> dict[str, Any]:
        """Equal steps, behind one that is not timed: what other engines did meanwhile has emptied the caches."""
        self.step(tokens, all_logits)
        return self.timed([tokens] * steps, all_logits)

    def timed(self, steps: list[int], all_logits: bool = False) -> dict[str, Any]:
        """One step after the other, of so many tokens of each sequence."""
        start = time.perf_counter()
        for tokens in steps:
            self.step(tokens, all_logits)
        seconds = time.perf_counter() - start
        logits = self._llama.llama_get_logits(self._context)
        finite = all(math.isfinite(logits[i]) for i in range(self._worker._vocab))
        return {"tokens": sum(steps) * self.count, "seconds": seconds, "finite": finite}

    def step(self, tokens: int, all_logits: bool = False) -> None:
        """Random tokens of every sequence; logits of its last one, or of all."""
        batch = self._batch
        batch.n_tokens = tokens * self.count
        for row in range(batch.n_tokens):
            sequence, at = divmod(row, tokens)
            batch.token[row] = self._worker._random.randrange(self._worker._vocab)
            batch.pos[row] = self.length + at
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = all_logits or at == tokens - 1
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} behind {self.length} tokens")
        self._llama.llama_synchronize(self._context)
        self.length += tokens
