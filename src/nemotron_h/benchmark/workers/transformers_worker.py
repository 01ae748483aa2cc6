"""transformers' own Nemotron-H in bfloat16, in a process of its own.

Letters: B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import transformers
from torch import Tensor

from nemotron_h import NemotronHConfig
from nemotron_h.benchmark.workers.torch_model import SHORT, Decoder, TorchWorker, random_weights, stored_bytes


class Worker(TorchWorker):
    """Actions: `load`, then the others in any order; `together` after `gather`."""

    model: Any
    batch: Decoder

    def load(self, config: dict[str, Any], threads: int) -> dict[str, Any]:
        """Random weights of a configuration; the seconds include the first token."""
        torch.set_num_threads(threads)
        start = time.perf_counter()
        ours = NemotronHConfig.from_dict(config)
        theirs = peer_config(ours)
        from transformers.models.nemotron_h import NemotronHForCausalLM

        self.model = random_weights(lambda: NemotronHForCausalLM(theirs), ours, torch.bfloat16, seed=0)
        self.decoder = Decoder(self._step, ours.vocab_size)
        self.decoder.decode(1)
        return {
            "seconds": time.perf_counter() - start,
            "weight_bytes": stored_bytes(self.model),
            "version": transformers.__version__,
        }

    def gather(self, sequences: int, tokens: int) -> None:
        """Sequences that go through the model in one batch; its cache finds room for `tokens` by itself."""
        self.batch = Decoder(self._step, self.model.config.vocab_size, sequences)
        self.batch.fill(SHORT)

    def together(self, tokens: int) -> dict[str, Any]:
        return self.batch.turn(tokens)

    def _step(self, ids_BT: Tensor, cache: Any, keep: int) -> tuple[Tensor, Any]:
        out = self.model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits, out.past_key_values


def peer_config(ours: NemotronHConfig) -> Any:
    """The same shape as transformers reads it, from the file that we write."""
    from transformers.models.nemotron_h import NemotronHConfig as PeerConfig

    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        return PeerConfig.from_pretrained(directory)
