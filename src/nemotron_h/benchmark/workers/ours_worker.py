"""This package's model, in a process of its own.

Letters: B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import nemotron_h
from nemotron_h import (
    LLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    NemotronHHybridDynamicCache,
    SamplingParams,
    packing,
)
from nemotron_h.benchmark.workers import bits
from nemotron_h.benchmark.workers.torch_model import SHORT, Decoder, TorchWorker, stored_bytes
from nemotron_h.ops import _native, settings
from nemotron_h.quantization import is_packed


class Worker(TorchWorker):
    """Actions: `load`, then the others in any order, `together` after `gather`; or `write` alone."""

    model: NemotronHForCausalLM
    prompts: list[list[int]]

    def load(
        self, config: dict[str, Any] | None, path: str | None, quantization: str | None, threads: int
    ) -> dict[str, Any]:
        """The weights at `path`, or random ones of a configuration; the seconds include the first token."""
        torch.set_num_threads(threads)
        start = time.perf_counter()
        if path is not None:
            self.model = loaded_model(path, quantization, threads)
        else:
            assert config is not None
            self.model = random_model(config, quantization)
        self.decoder = Decoder(self._step, self.model.config.vocab_size)
        self.decoder.decode(1)
        return {
            "seconds": time.perf_counter() - start,
            "weight_bytes": stored_bytes(self.model),
            "version": f"{nemotron_h.__version__} {_kernels()}",
        }

    def write(self, config: dict[str, Any], quantization: str | None, directory: str) -> None:
        """A checkpoint with random weights."""
        random_model(config, quantization).save_pretrained(directory)

    def gather(self, sequences: int, tokens: int) -> None:
        """Prompts that `LLM.generate` gets as one list; its cache finds room for `tokens` by itself."""
        self.prompts = bits.random_prompts(self.model.config.vocab_size, sequences, SHORT)
        self.together(4)

    def together(self, tokens: int) -> dict[str, Any]:
        """The decode phase alone; the first token of every text belongs to its prompt."""
        llm = LLM(self.model, threads=torch.get_num_threads(), max_num_seqs=len(self.prompts))
        results = llm.generate(self.prompts, SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True))
        stats = llm.stats()
        return {
            "tokens": stats["tokens"]["decode"],
            "seconds": stats["seconds"]["decode"],
            "finite": all(result.finish_reason != "error" for result in results),
        }

    def check_bits(self, tokens: int, sequences: int) -> dict[str, Any]:
        """As `bits.compare`; promised: whether equal bits are, as they are for packed weights on kernels."""
        packed = is_packed(getattr(self.model.config, "quantization_config", None))
        return {**bits.compare(self.model, tokens, sequences), "promised": packed and _kernels() != "reference"}

    def compare_paths(self, tokens: int, repeats: int) -> dict[str, Any]:
        """Tokens per second of the plain step, `model.generate` and `LLM.generate`; medians of alternating rounds.

        Each starts with one random token, and writes greedily without an end.
        """
        ways = {"step": self._by_step, "model.generate": self._by_generate, "LLM.generate": self._by_llm}
        for way in ways.values():
            way(4)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                seconds[name].append(timed(way, tokens))
        return {"tokens_per_second": {name: tokens / statistics.median(s) for name, s in seconds.items()}}

    def _step(self, ids_BT: Tensor, cache: NemotronHHybridDynamicCache | None, keep: int) -> tuple[Tensor, Any]:
        cache = NemotronHHybridDynamicCache(self.model.config) if cache is None else cache
        out = self.model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits, out.past_key_values

    def _by_step(self, tokens: int) -> None:
        decoder = Decoder(self._step, self.model.config.vocab_size)
        decoder.decode(tokens)

    def _by_generate(self, tokens: int) -> None:
        ids_BT = torch.tensor([[random.randrange(self.model.config.vocab_size)]])
        model: Any = self.model  # transformers types `generate` for its own classes
        out_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert out_BT.shape[1] == 1 + tokens

    def _by_llm(self, tokens: int) -> None:
        llm = LLM(self.model, threads=torch.get_num_threads())
        prompt = [random.randrange(self.model.config.vocab_size)]
        result = llm.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))[0]
        assert len(result.token_ids) == tokens


def timed(work: Callable[[int], None], tokens: int) -> float:
    start = time.perf_counter()
    work(tokens)
    return time.perf_counter() - start


def _kernels() -> str:
    """The level of the kernels in force, or "reference"."""
    reference = settings.current().impl == "reference" or _native.load() is None
    return "reference" if reference else _native.level()


def loaded_model(path: str, quantization: str | None, threads: int) -> NemotronHForCausalLM:
    """Weights from files, as `LLM` loads them; a packed checkpoint says itself what it is."""
    packed = NemotronHConfig.from_pretrained(path).to_dict().get("quantization_config") is not None
    return LLM(path, quantization=None if packed else quantization, threads=threads).model


def random_model(config: dict[str, Any], quantization: str | None) -> NemotronHForCausalLM:
    """Random weights: packed ones, or bfloat16."""
    made = NemotronHConfig.from_dict(config)
    made.dtype = torch.bfloat16
    return packing.random_model(made, quantization)
