"""Float64 models, batches with padding and plain decoding, for the tests of `generate`."""

from typing import Any

import torch
from torch import Tensor

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM

PATTERNS = ["ME*-M", "MMM", "**", "E-", "*EM"]
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
BEAMS: dict[str, Any] = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}


def double_model(pattern: str, seed: int = 0, **overrides: Any) -> NemotronHForCausalLM:
    """In float64, where no two orders of summation choose different tokens."""
    return tiny_model(seed, hybrid_override_pattern=pattern, **overrides).double()


@torch.no_grad()
def decode(model: NemotronHForCausalLM, row_T: Tensor, steps: int = 10) -> Tensor:
    """The greedy continuation [steps] of one row, by full forward passes without a cache."""
    ids_T = row_T
    for _ in range(steps):
        ids_T = torch.cat([ids_T, model(ids_T[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return ids_T[len(row_T) :]


def batch_of(rows: list[Tensor], starts: list[int], width: int, filler: int = 0) -> dict[str, Tensor]:
    """Row i from column starts[i] on, `filler` and mask 0 around it."""
    ids_BT = torch.full((len(rows), width), filler)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row_T, start) in enumerate(zip(rows, starts, strict=True)):
        ids_BT[i, start : start + len(row_T)], mask_BT[i, start : start + len(row_T)] = row_T, 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}
